"""A bound on the work that begins in one turn of the event loop.

Owns: who begins now and who in a later turn, in order. Does not know: what the work is.

A turn handles every connection that has something to read. With a thousand of them it takes a tenth of a second, in which
no answer of the engine is read, nothing is sent to it, and no health probe is answered; most of it would be refusals. And
clients that are refused at once and come back at once would have this process do nothing but refuse, on cores that the engine
needs: while there are refusals, a turn is followed by a rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial


class TurnGate:
    """Lets ``per_turn`` callers pass in each turn of the loop; the others pass in the next turns, first come, first served.

    A turn for which a ``rest`` was asked lasts for ``rest_s`` seconds: no more than ``per_turn`` pass in them.
    """

    def __init__(self, per_turn: int, rest_s: float = 0.0) -> None:
        self._per_turn = per_turn
        self._rest_s = rest_s
        self._rests = False
        self._passed = 0
        self._waiting: deque[Callable[[], bool]] = deque()
        self._is_counting = False

    def enter(self, begin: Callable[[], bool]) -> None:
        """Call ``begin`` now, or in a later turn; it says whether there was still something to begin, and raises nothing."""
        if self._passes():
            begin()
        else:
            self._waiting.append(begin)

    async def wait(self) -> None:
        """Return now, or in a later turn."""
        if self._passes():
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(partial(_let_pass, place))
        await place

    def rest(self) -> None:
        """Have the turn at hand followed by a rest; whoever calls has passed in it."""
        self._rests = True

    def _passes(self) -> bool:
        if self._passed >= self._per_turn or self._waiting:
            return False
        self._passed += 1
        self._count_turns()
        return True

    def _count_turns(self) -> None:
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        if self._rests and self._rest_s:
            asyncio.get_running_loop().call_later(self._rest_s, self._begin_turn)
        else:
            self._begin_turn()

    def _begin_turn(self) -> None:
        self._passed = 0
        self._is_counting = self._rests = False
        while self._waiting and self._passed < self._per_turn:
            if self._waiting.popleft()():
                self._passed += 1
        if self._passed:
            self._count_turns()


def _let_pass(place: asyncio.Future[None]) -> bool:
    if place.done():  # cancelled: its client has left
        return False
    place.set_result(None)
    return True
