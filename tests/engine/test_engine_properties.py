"""Whatever happens to an engine, every request ends exactly once, with its own answer or with the right error."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.interface import Outcome, Prediction, Request
from service.engine.local_engine import LocalEngine
from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from tests.support.fake_runner import FakeRunner, PolledFakeRunner, fake_model, images, mark_of, numbers_of, running_engine
from tests.support.patience import until

MAX_BATCH_SIZE = 4
MAX_QUEUE_IMAGES = 8


@dataclass(frozen=True)
class Submit:
    """A request of that many images; the device fails on a bad one; an expiring one is late before it can be dispatched."""

    size: int
    bad: bool = False
    expires: bool = False


@dataclass(frozen=True)
class Cancel:
    """The client of one of the requests so far leaves; it may have been answered already."""

    which: int


@dataclass(frozen=True)
class LetGo:
    """The device ends that many calls."""

    calls: int


@dataclass(frozen=True)
class Iteration:
    """One iteration of the event loop; without it, steps fall into one iteration."""


@dataclass(frozen=True)
class Swap:
    """Another model is swapped in."""


Step = Submit | Cancel | LetGo | Iteration | Swap


@dataclass
class Asked:
    """One accepted request and what became of it."""

    numbers: list[int]
    bad: bool
    expires: bool
    outcomes: list[Outcome] = field(default_factory=list)
    cancelled: bool = False
    cancelled_while_waiting: bool = False
    request: Request | None = None


class Scenario:
    """One engine with its devices, and every request it has accepted."""

    def __init__(self, engine: LocalEngine, runner: FakeRunner, memory_images: int, patience_s: float) -> None:
        self.engine = engine
        self.patience_s = patience_s
        self.runners = [runner]
        self.asked: list[Asked] = []
        self._memory_images = memory_images
        self._bad: set[int] = set()
        self._next_number = 0
        self._give_limits(runner)

    def do(self, step: Step) -> None:
        """Take one step."""
        match step:
            case Submit():
                self._submit(step)
            case Cancel(which) if self.asked:
                self._cancel(self.asked[which % len(self.asked)])
            case LetGo(calls):
                for runner in self.runners:
                    runner.let_go(calls)
            case Swap():
                runner = type(self.runners[0])(
                    streams=self.runners[0].streams, max_batch_size=MAX_BATCH_SIZE, held=True, mark=len(self.runners)
                )
                self._give_limits(runner)
                self.runners.append(runner)
                self.engine.swap(fake_model(runner, version_of(len(self.runners) - 1)))

    def open(self) -> None:
        """Let every device end whatever it gets."""
        for runner in self.runners:
            runner.open()

    def all_ended(self) -> bool:
        """Whether every request has its outcome."""
        return all(asked.outcomes or asked.cancelled for asked in self.asked)

    @property
    def on_a_device(self) -> set[int]:
        """The numbers of all images that any device has seen."""
        return {number for runner in self.runners for batch in list(runner.batches) for number in batch}

    def _submit(self, step: Submit) -> None:
        numbers = list(range(self._next_number, self._next_number + step.size))
        self._next_number += step.size
        asked = Asked(numbers, step.bad, step.expires)
        if step.bad:
            self._bad.add(numbers[-1])
        depth = self.engine.status().queue_depth
        deadline = time.monotonic() + (0.001 if step.expires else self.patience_s)
        try:
            asked.request = self.engine.submit(images(*numbers), deadline, asked.outcomes.append)
        except Overloaded:
            assert depth + step.size > MAX_QUEUE_IMAGES, "refused although there was room"
            return
        except DeadlineExceeded:
            assert deadline < math.inf, "refused although there was time"
            return
        assert depth + step.size <= MAX_QUEUE_IMAGES, "accepted although there was no room"
        self.asked.append(asked)
        while step.expires and time.monotonic() < deadline:
            time.sleep(0.0005)

    def _cancel(self, asked: Asked) -> None:
        assert asked.request is not None, "accepted"
        depth = self.engine.status().queue_depth
        self.engine.cancel(asked.request)
        if not asked.outcomes and not asked.cancelled:
            asked.cancelled = True
            asked.cancelled_while_waiting = self.engine.status().queue_depth < depth

    def _give_limits(self, runner: FakeRunner) -> None:
        runner.fails = lambda numbers: len(numbers) > self._memory_images or not self._bad.isdisjoint(numbers)


def version_of(mark: int) -> str:
    """Return the version of the model with this mark."""
    return f"{mark:012x}"


async def one_iteration() -> None:
    """Let the event loop run what is ready."""
    done = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(done.set_result, None)
    await done


def check_endings(scenario: Scenario, memory_images: int, *, all_answered: bool) -> None:
    """Hold every request against what was promised to it."""
    on_a_device = scenario.on_a_device
    for asked in scenario.asked:
        assert len(asked.outcomes) + asked.cancelled == 1, "it ends exactly once"
        if asked.expires or asked.cancelled_while_waiting:
            assert on_a_device.isdisjoint(asked.numbers), "it never reaches the device"
        if asked.cancelled:
            continue
        outcome = asked.outcomes[0]
        if isinstance(outcome, Prediction):
            assert numbers_of(outcome.probabilities) == asked.numbers, "nobody gets another's answer"
            assert version_of(mark_of(outcome.probabilities)) == outcome.model.version, "it names the model that made it"
            assert outcome.batch_size <= MAX_BATCH_SIZE
            assert not asked.bad
            assert not asked.expires
        elif isinstance(outcome, InferenceFailed):
            assert asked.bad or len(asked.numbers) > memory_images, "only the culprit fails"
        elif isinstance(outcome, DeadlineExceeded):
            assert asked.expires or scenario.patience_s < math.inf
        else:
            assert isinstance(outcome, NotReady)
            assert not all_answered, "what was accepted is answered"


def quiet_steps() -> st.SearchStrategy[Step]:
    """Everything that may happen between an engine's start and its end."""
    return st.one_of(
        st.builds(Submit, st.integers(1, MAX_BATCH_SIZE), st.integers(0, 9).map(lambda n: n == 0), st.booleans()),
        st.builds(Submit, st.integers(1, 2)),
        st.builds(Cancel, st.integers(0, 50)),
        st.builds(LetGo, st.integers(1, 4)),
        st.builds(Iteration),
        st.builds(Swap),
    )


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(quiet_steps(), max_size=60),
    streams=st.integers(1, 3),
    polled=st.booleans(),
    memory_images=st.integers(1, MAX_BATCH_SIZE),
    uses_uvloop=st.booleans(),
    ending=st.sampled_from(["answers", "deadlines on a hung device", "close"]),
)
def test_every_request_ends_exactly_once_with_its_own_answer(
    steps: Sequence[Step], streams: int, polled: bool, memory_images: int, uses_uvloop: bool, ending: str
) -> None:
    """Random arrivals, departures, deadlines, bad images, memory limits, new models, hangs and endings break no promise."""

    async def live() -> None:
        runner = (PolledFakeRunner if polled else FakeRunner)(streams=streams, max_batch_size=MAX_BATCH_SIZE, held=True)
        async with running_engine(runner, version=version_of(0), max_queue_images=MAX_QUEUE_IMAGES) as engine:
            patience_s = 0.05 if ending == "deadlines on a hung device" else math.inf
            scenario = Scenario(engine, runner, memory_images, patience_s)
            try:
                for step in steps:
                    scenario.do(step)
                    if isinstance(step, Iteration | LetGo):
                        await one_iteration()
                if ending == "answers":
                    scenario.open()
                    await until(scenario.all_ended)
                elif ending == "deadlines on a hung device":
                    await until(scenario.all_ended)
                    scenario.open()
                else:
                    engine.close()
                    scenario.open()
                if ending != "close":  # after it, a failed batch is not run again, so it may never come back
                    await until(lambda: not engine.longest_running_s)  # late results come back too, and change nothing
            finally:
                scenario.open()
            assert engine.status().queue_depth == 0, "nothing is left in the queue"
            check_endings(scenario, memory_images, all_answered=ending != "close")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uses_uvloop else None) as loop:
        loop.run(live())
