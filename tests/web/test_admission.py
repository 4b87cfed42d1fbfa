"""The gate that bounds the requests that start in one iteration of the event loop."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from service.web.admission import AdmissionGate

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops."""
    return "asyncio", {"use_uvloop": request.param}


class Starts:
    """What a gate has started, in order; every start takes a second of ``clock``, and ``all`` is set after ``expected``."""

    def __init__(self, iteration_s: float, expected: int, back_off_s: float = 0.0) -> None:
        self.names: list[object] = []
        self.all = asyncio.Event()
        self.gate = AdmissionGate(iteration_s, back_off_s, clock=lambda: self._now)
        self._now = 0.0
        self._expected = expected

    def enter(self, name: object, *, still_wanted: bool = True) -> None:
        self.gate.enter(partial(self._start, name, still_wanted))

    def note(self, name: object) -> None:
        self.names.append(name)
        if len(self.names) == self._expected:
            self.all.set()

    def _start(self, name: object, still_wanted: bool) -> bool:
        if still_wanted:
            self._now += 1.0
            self.note(name)
        return still_wanted


async def test_requests_start_in_the_order_in_which_they_came() -> None:
    """Nobody overtakes, and what is not wanted any more takes no place."""
    starts = Starts(3, 10)
    for name in range(12):
        starts.enter(name, still_wanted=name not in (4, 5))
    await asyncio.wait_for(starts.all.wait(), 60)
    assert starts.names == [0, 1, 2, 3, *range(6, 12)]


@pytest.mark.parametrize(("iteration_s", "at_once"), [(2, 2), (0.5, 1)])
async def test_starts_end_with_their_time_and_others_have_their_iteration(iteration_s: float, at_once: int) -> None:
    """Between two batches of starts, the event loop does everything else that was ready; one start is always made."""
    starts = Starts(iteration_s, 6 + 6 // at_once - 1)  # a mark stands between two batches
    loop = asyncio.get_running_loop()

    def mark() -> None:
        if not starts.all.is_set():
            starts.note("|")
            loop.call_soon(mark)

    for name in range(6):
        starts.enter(name)
    loop.call_soon(mark)
    await asyncio.wait_for(starts.all.wait(), 60)
    batches = "".join(map(str, starts.names)).strip("|").split("|")
    assert max(map(len, batches)) == at_once


async def test_what_starts_waits_for_all_that_was_read() -> None:
    """Work starts after everything that was ready when it was announced, all of it together."""
    starts = Starts(3, 6)
    loop = asyncio.get_running_loop()

    def read(name: str) -> None:
        starts.note(f"read {name}")
        starts.enter(f"start {name}")

    for name in "abc":
        loop.call_soon(read, name)
    await asyncio.wait_for(starts.all.wait(), 60)
    assert starts.names == [f"{step} {name}" for step in ("read", "start") for name in "abc"]


async def test_after_a_refusal_the_others_wait_for_the_end_of_the_back_off() -> None:
    """Only those that this iteration has time for start before."""
    loop = asyncio.get_running_loop()
    starts = Starts(2, 3, back_off_s=0.02)
    starts.gate.enter(lambda: starts.gate.back_off() or True)  # type: ignore[func-returns-value]
    began = loop.time()
    for name in range(3):
        starts.enter(name)
    await asyncio.wait_for(starts.all.wait(), 60)
    assert starts.names == [0, 1, 2]
    assert loop.time() - began >= 0.019  # never sooner; how much later depends on the machine
