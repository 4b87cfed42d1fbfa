"""The event loop of the engine and the worker processes: uvloop where it is installed, else asyncio's own.

Owns: that choice. Does not know: what runs on the loop.
"""

from __future__ import annotations

import asyncio


def open_event_loop() -> asyncio.Runner:
    """Give a runner, to be closed by ``with``."""
    try:
        import uvloop
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
