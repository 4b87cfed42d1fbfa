"""Signals as requests to stop, which a loop reads between two of its steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal


class StopRequest:
    """Whether a signal asked to stop."""

    requested = False


@contextmanager
def stop_signals(*numbers: signal.Signals, second: Literal["as before", "default", "ignored"]) -> Iterator[StopRequest]:
    """Turn these signals into a request that the loop reads after each step; on the main thread only.

    Another signal of the same number does at once what it did ``as before``, or what it does by ``default``, which ends the
    process, or is ``ignored``.
    """
    stop = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        if second != "ignored":
            signal.signal(number, signal.SIG_DFL if second == "default" else before[signal.Signals(number)])

    for number in numbers:
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
