"""Where log lines go and what they look like: one line an event, ``key=value`` after the message, on standard error.

Owns: the format. Does not know: who logs what.
"""

from __future__ import annotations

import logging

from service.settings import Settings


def set_up_logs(settings: Settings) -> None:
    """Set up the root logger for this process and those forked from it."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("uvicorn").setLevel("WARNING")
