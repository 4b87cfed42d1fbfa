"""Many deadlines on one timer of the event loop.

Owns: who is late, and when to look. Does not know: what was to be done by then.

Nearly all deadlines are met, and each is mostly as far off as the one before: a timer of its own, set and cancelled, would be
most of what it costs. The one timer here goes off at the earliest deadline that was known when it was set, met or not, and
is then set for the earliest that is left; only an earlier one than that sets it anew.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol


class Expires(Protocol):
    """What can be late; ``expire`` is called once, when it is, and raises nothing."""

    def expire(self) -> None:
        """End it."""


class DeadlineWatch:
    """Calls ``expire`` of what was added and not removed by its deadline, a ``time.monotonic()`` in seconds."""

    def __init__(self) -> None:
        self._deadlines: dict[Expires, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def add(self, what: Expires, deadline: float) -> None:
        """Watch ``what``, on the running loop."""
        self._deadlines[what] = deadline
        if deadline < self._timer_at:
            self._set_timer(deadline)

    def remove(self, what: Expires) -> None:
        """Watch it no longer, if it was watched."""
        self._deadlines.pop(what, None)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = time.monotonic()
        late = [what for what, deadline in self._deadlines.items() if deadline <= now]
        for what in late:
            del self._deadlines[what]
        if self._deadlines:
            self._set_timer(min(self._deadlines.values()))
        for what in late:
            what.expire()
