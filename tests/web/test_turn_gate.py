"""The bound on what begins in one turn of the event loop."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from service.web.turn_gate import TurnGate

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops: what a turn is differs between them."""
    return "asyncio", {"use_uvloop": request.param}


class Turns:
    """Counts the turns of the running loop, and notes who passed the gate in which."""

    def __init__(self, gate: TurnGate) -> None:
        self.gate = gate
        self.number = 0
        self.passed: list[tuple[int, int]] = []  # turn, caller
        self._counting = asyncio.get_running_loop().call_soon(self._count)

    def _count(self) -> None:
        self.number += 1
        self._counting = asyncio.get_running_loop().call_soon(self._count)

    async def pass_gate(self, caller: int) -> None:
        await self.gate.wait()
        self.passed.append((self.number, caller))

    def stop(self) -> None:
        self._counting.cancel()


async def test_no_more_than_the_bound_pass_in_a_turn_and_in_order() -> None:
    """Ten callers of one turn pass three at a time, first come, first served."""
    turns = Turns(TurnGate(3))
    await asyncio.gather(*(turns.pass_gate(caller) for caller in range(10)))
    turns.stop()
    assert [caller for _, caller in turns.passed] == list(range(10))
    counts = [sum(turn == at for at, _ in turns.passed) for turn in range(turns.number + 1)]
    assert max(counts) == 3


async def test_who_comes_later_does_not_overtake() -> None:
    """A caller of a later turn waits behind those who wait already."""
    turns = Turns(TurnGate(1))
    early = [asyncio.create_task(turns.pass_gate(caller)) for caller in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.gather(*early, turns.pass_gate(5))
    turns.stop()
    assert [caller for _, caller in turns.passed] == list(range(6))


async def test_an_idle_gate_lets_pass_after_the_turn() -> None:
    """Without company nobody waits for more than a turn, at first and after the gate was busy."""
    turns = Turns(TurnGate(2))
    for caller in range(3):
        await asyncio.gather(*(turns.pass_gate(caller) for _ in range(5)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        before = turns.number
        await turns.pass_gate(caller)
        turn, passed = turns.passed[-1]
        assert passed == caller
        assert turn - before <= 2  # one for the gate, one for the task to go on
    turns.stop()


async def test_what_begins_waits_for_all_that_is_ready() -> None:
    """Work begins after everything that the turn had to do when it was announced, all of it together."""
    gate = TurnGate(2)
    did: list[str] = []
    loop = asyncio.get_running_loop()

    def begin(name: str) -> bool:
        did.append(f"begin {name}")
        return True

    def read(name: str) -> None:
        did.append(f"read {name}")
        gate.enter(partial(begin, name))

    for name in "abc":
        loop.call_soon(read, name)
    while len(did) < 6:
        await asyncio.sleep(0)
    assert did == [f"{step} {name}" for step in ("read", "begin") for name in "abc"]


async def test_who_leaves_takes_no_place() -> None:
    """A cancelled caller is passed over, and those behind it lose nothing."""
    turns = Turns(TurnGate(1))
    tasks = [asyncio.create_task(turns.pass_gate(caller)) for caller in range(6)]
    await asyncio.sleep(0)
    for task in tasks[2:5]:
        task.cancel()
    await asyncio.wait(tasks)
    turns.stop()
    assert [caller for _, caller in turns.passed] == [0, 1, 5]
    assert all(task.cancelled() for task in tasks[2:5])


async def test_a_turn_with_a_rest_lasts_longer() -> None:
    """Those beyond the bound pass when the rest is over, in order; the turn after it is as short as ever."""
    turns = Turns(TurnGate(2, rest_s=0.02))

    def refused() -> bool:
        turns.gate.rest()
        return True

    turns.gate.enter(refused)
    began = turns.number
    await asyncio.gather(*(turns.pass_gate(caller) for caller in range(5)))
    turns.stop()
    assert [caller for _, caller in turns.passed] == list(range(5))
    at = [turn - began for turn, _ in turns.passed]
    assert at[0] <= 3  # its own turn, and the task goes on
    assert at[1] > 10  # the loop turned all the while
    assert at[1] == at[2] == at[3] - 1 == at[4] - 1
