"""Bounds the time in which requests start in one iteration of the event loop.

An iteration handles every readable connection. With a thousand of them it takes a tenth of a second, in which no result of
the engine is read, nothing is sent to it, and no health probe is answered; most of it would be refusals. Clients that are
refused at once and come back at once would have this process do nothing but refuse, on cores that the engine needs; so after
a refusal the gate backs off (89 -> 99 % of the rate under tenfold overload).

Starting after all readable sockets were read is also faster than starting where each was read: the same few instructions
and data stay in the cache. A millisecond is about 16 small images or one photograph, which the engine has while the next one
is decoded.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable


class AdmissionGate:
    """Starts requests for ``iteration_s`` seconds of an event-loop iteration, at least one, first come, first served.

    After ``back_off`` none start for ``back_off_s`` seconds. ``clock`` returns seconds.
    """

    def __init__(self, iteration_s: float, back_off_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._iteration_s = iteration_s
        self._back_off_s = back_off_s
        self._clock = clock
        self._waiting: deque[Callable[[], bool]] = deque()
        self._is_scheduled = False
        self._backs_off = False

    def enter(self, start: Callable[[], bool]) -> None:
        """Have ``start`` called at the end of this iteration or later; it raises nothing.

        It returns whether there was still something to start.
        """
        self._waiting.append(start)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def back_off(self) -> None:
        """Start no more than this iteration has time for, for ``back_off_s`` seconds from its end; called by a ``start``."""
        self._backs_off = True

    def _start(self) -> None:
        end = self._clock() + self._iteration_s
        while self._waiting:
            if self._waiting.popleft()() and self._clock() >= end:
                break
        loop = asyncio.get_running_loop()
        if self._backs_off:
            self._backs_off = False
            loop.call_soon(loop.call_later, self._back_off_s, self._start)
        elif self._waiting:
            loop.call_soon(self._start)
        else:
            self._is_scheduled = False
