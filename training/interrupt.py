"""Signals as requests to stop, answered by the loop between two steps.

Owns: SIGINT and SIGTERM while a run goes on. Does not know: what is saved.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class StopRequest:
    """Whether a signal asked the run to stop."""

    requested = False


@contextmanager
def stop_signals(*, second_acts: bool = True) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop reads after each step.

    With ``second_acts`` another signal does at once what it did before. Under torchrun it must not: a terminal's Ctrl-C
    reaches every process, and torchrun passes it on once more.
    """
    stop = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        if second_acts:
            signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
