"""Waiting for what takes an unknown, short time.

No test measures against the limit: it only ends a test that would hang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_PATIENCE_S = 60.0
_PAUSE_S = 0.01


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until ``condition`` holds; raise AssertionError after a minute."""
    limit = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, "it did not come true"
        time.sleep(_PAUSE_S)


async def until(condition: Callable[[], bool]) -> None:
    """Like ``wait_until``, on the event loop."""
    limit = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, "it did not come true"
        await asyncio.sleep(0.001)
