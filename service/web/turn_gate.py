"""A bound on the work that begins in one turn of the event loop, and its place there: after everything that was read.

Owns: who begins in which turn, in order. Does not know: what the work is.

A turn handles every connection that has something to read. With a thousand of them it takes a tenth of a second, in which
no answer of the engine is read, nothing is sent to it, and no health probe is answered; most of it would be refusals. And
clients that are refused at once and come back at once would have this process do nothing but refuse, on cores that the engine
needs: while there are refusals, a turn is followed by a rest.

Work that begins where its request was read takes longer than the same work after all that was read: reading and parsing one
connection after another is done with the same few instructions and data, and so is decoding one image after another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial


class TurnGate:
    """Lets ``per_turn`` callers pass at the end of each turn of the loop; the others pass later, first come, first served.

    A turn for which a ``rest`` was asked lasts for ``rest_s`` seconds more: no more than ``per_turn`` pass until they are over.
    """

    def __init__(self, per_turn: int, rest_s: float = 0.0) -> None:
        self._per_turn = per_turn
        self._rest_s = rest_s
        self._left = 0  # of this turn
        self._waiting: deque[Callable[[], bool]] = deque()
        self._is_scheduled = False
        self._is_resting = False

    def enter(self, begin: Callable[[], bool]) -> None:
        """Have ``begin`` called at the end of this turn or of a later one; it raises nothing.

        It says whether there was still something to begin.
        """
        self._waiting.append(begin)
        self._schedule()

    async def wait(self) -> None:
        """Return after this turn, or after a later one."""
        place = asyncio.get_running_loop().create_future()
        self.enter(partial(_settle, place))
        await place

    def rest(self) -> None:
        """Have the turn at hand followed by a rest; whoever calls has passed in it."""
        if not self._is_resting:
            self._is_resting = True
            asyncio.get_running_loop().call_soon(self._begin_rest)

    def _begin_rest(self) -> None:
        """Rest from now on: what the turn had to do is done."""
        asyncio.get_running_loop().call_later(self._rest_s, self._end_rest)

    def _end_rest(self) -> None:
        self._is_resting = False
        if self._waiting:
            self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._let_pass)

    def _let_pass(self) -> None:
        self._is_scheduled = False
        if not self._is_resting:
            self._left = self._per_turn
        while self._waiting and self._left:
            if self._waiting.popleft()():
                self._left -= 1
        if self._waiting and not self._is_resting:
            self._schedule()


def _settle(place: asyncio.Future[None]) -> bool:
    if place.done():  # cancelled: its client has left
        return False
    place.set_result(None)
    return True
