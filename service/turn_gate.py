"""A bound on the work that begins in one turn of the event loop.

Owns: who begins now and who in a later turn, in order. Does not know: what the work is.

A turn handles every connection that has something to read. With a thousand of them it takes a tenth of a second, in which
no answer of the engine is read, nothing is sent to it, and no health probe is answered; most of it would be refusals.
"""

from __future__ import annotations

import asyncio
from collections import deque


class TurnGate:
    """Lets ``per_turn`` callers pass in each turn of the loop; the others pass in the next turns, first come, first served."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._passed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_counting = False

    async def wait(self) -> None:
        """Return now, or in a later turn."""
        if self._passed < self._per_turn and not self._waiting:
            self._passed += 1
            self._count_turns()
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        await place

    def _count_turns(self) -> None:
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self._passed = 0
        self._is_counting = False
        while self._waiting and self._passed < self._per_turn:
            place = self._waiting.popleft()
            if not place.done():  # cancelled: its client has left
                place.set_result(None)
                self._passed += 1
        if self._passed:
            self._count_turns()
