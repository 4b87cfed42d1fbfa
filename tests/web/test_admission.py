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
    """What a gate has started, in order; ``all`` is set once as many as expected have."""

    def __init__(self, gate: AdmissionGate, expected: int) -> None:
        self.names: list[object] = []
        self.all = asyncio.Event()
        self._gate = gate
        self._expected = expected

    def enter(self, name: object, *, still_wanted: bool = True) -> None:
        self._gate.enter(partial(self._start, name, still_wanted))

    def _start(self, name: object, still_wanted: bool) -> bool:
        if still_wanted:
            self.names.append(name)
            if len(self.names) == self._expected:
                self.all.set()
        return still_wanted


async def test_requests_start_in_the_order_in_which_they_came() -> None:
    """Nobody overtakes, and what is not wanted any more takes no place."""
    starts = Starts(AdmissionGate(3), 10)
    for name in range(12):
        starts.enter(name, still_wanted=name not in (4, 5))
    await asyncio.wait_for(starts.all.wait(), 60)
    assert starts.names == [0, 1, 2, 3, *range(6, 12)]


async def test_no_more_than_the_bound_start_before_others_have_their_iteration() -> None:
    """Between two batches of starts, the event loop does everything else that was ready."""
    starts = Starts(AdmissionGate(2), 6)
    loop = asyncio.get_running_loop()

    def mark() -> None:
        starts.names.append("|")
        if not starts.all.is_set():
            loop.call_soon(mark)

    for name in range(6):
        starts.enter(name)
    loop.call_soon(mark)
    starts._expected = 6 + 2  # two marks stand between three batches
    await asyncio.wait_for(starts.all.wait(), 60)
    batches = "".join(map(str, starts.names)).strip("|").split("|")
    assert max(map(len, batches)) == 2


async def test_what_starts_waits_for_all_that_was_read() -> None:
    """Work starts after everything that was ready when it was announced, all of it together."""
    starts = Starts(AdmissionGate(2), 6)
    loop = asyncio.get_running_loop()

    def read(name: str) -> None:
        starts.names.append(f"read {name}")
        starts.enter(f"start {name}")

    for name in "abc":
        loop.call_soon(read, name)
    await asyncio.wait_for(starts.all.wait(), 60)
    assert starts.names == [f"{step} {name}" for step in ("read", "start") for name in "abc"]


async def test_after_a_refusal_the_others_wait_for_the_end_of_the_back_off() -> None:
    """Only those that this iteration has left start before."""
    loop = asyncio.get_running_loop()
    gate = AdmissionGate(2, back_off_s=0.02)
    starts = Starts(gate, 3)
    gate.enter(lambda: gate.back_off() or True)  # type: ignore[func-returns-value]
    began = loop.time()
    for name in range(3):
        starts.enter(name)
    await asyncio.wait_for(starts.all.wait(), 60)
    assert starts.names == [0, 1, 2]
    assert loop.time() - began >= 0.019  # never sooner; how much later depends on the machine
