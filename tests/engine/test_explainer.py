"""Explanations: one at a time, a bounded number, with the deadlines of every request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from service.engine.interface import Explanation
from service.engine.local_engine import LocalEngine
from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from service.model.class_activation import ClassActivation
from tests.support.fake_runner import FakeRunner, fake_model, image, images, predict, running_engine
from tests.support.patience import until

pytestmark = pytest.mark.anyio

T = TypeVar("T")

LATER = time.monotonic() + 1e6


class HeldMaps(ClassActivation):
    """Maps that are made when the test lets them be; or that fail."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.asked: list[int | None] = []
        self.fails = False

    def heatmap(self, image: NDArray[np.uint8], label: int | None = None) -> tuple[int, NDArray[np.float32]]:
        """See ``ClassActivation.heatmap``."""
        self.asked.append(label)
        self.begun.set()
        assert self.may_end.wait(60)
        if self.fails:
            raise ValueError("on demand")
        return label or 0, np.zeros(image.shape[1:], np.float32)


def explaining(engine: LocalEngine, runner: FakeRunner | None = None) -> HeldMaps:
    """Return the engine's model maps that the test holds."""
    maps = HeldMaps()
    engine.swap(replace(fake_model(runner or FakeRunner()), maps=maps))
    return maps


async def test_too_many_explanations_are_refused() -> None:
    """Sixteen may be under way; one more is refused, and every other one is made."""
    async with running_engine(FakeRunner()) as engine:
        maps = explaining(engine)
        jobs = [asyncio.create_task(engine.explain(image(0), number % 10, LATER)) for number in range(17)]
        done, _ = await asyncio.wait(jobs, timeout=60, return_when=asyncio.FIRST_EXCEPTION)
        assert [type(job.exception()) for job in done] == [Overloaded]
        maps.may_end.set()
        answers = [each for each in await asyncio.gather(*jobs, return_exceptions=True) if isinstance(each, Explanation)]
        assert [answer.label for answer in answers] == [number % 10 for number in range(16)]


async def test_few_explanations_may_wait_while_predictions_run() -> None:
    """While the device is busy maps are made slowly, so what would wait for long is refused, with a time to retry after."""
    runner = FakeRunner(held=True)
    async with running_engine(runner) as engine:
        maps = explaining(engine, runner)
        engine._explainer._cost_s = 0.1  # of a map made before; more than a second while predictions run
        busy = asyncio.create_task(predict(engine, images(1), LATER))
        await until(lambda: engine.longest_running_s > 0)
        jobs = [asyncio.create_task(engine.explain(image(0), 1, LATER)) for _ in range(3)]
        done, _ = await asyncio.wait(jobs, timeout=60, return_when=asyncio.FIRST_EXCEPTION)
        [refused] = [job.exception() for job in done]
        assert isinstance(refused, Overloaded)
        assert refused.retry_after_s == 4
        maps.may_end.set()
        runner.open()
        await asyncio.gather(busy, *jobs, return_exceptions=True)


async def test_an_explanation_ends_at_its_deadline_and_is_not_begun_after_it() -> None:
    """It waits behind one that hangs, and its time passes."""
    async with running_engine(FakeRunner()) as engine:
        maps = explaining(engine)
        first = asyncio.create_task(engine.explain(image(0), 1, LATER))
        assert await asyncio.to_thread(maps.begun.wait, 60)
        with pytest.raises(DeadlineExceeded):
            await engine.explain(image(0), 2, time.monotonic() + 0.01)
        maps.may_end.set()
        await first
        await engine.explain(image(0), 3, LATER)
        assert maps.asked == [1, 3]


async def test_a_failed_explanation_fails_its_own_request() -> None:
    """A map that cannot be made ends with the error that says so."""
    async with running_engine(FakeRunner()) as engine:
        maps = explaining(engine)
        maps.fails = True
        maps.may_end.set()
        with pytest.raises(InferenceFailed):
            await engine.explain(image(0), None, LATER)


async def test_an_engine_that_was_closed_explains_nothing() -> None:
    """It refuses as it refuses predictions."""
    async with running_engine(FakeRunner()) as engine:
        explaining(engine).may_end.set()
        engine.close()
        with pytest.raises(NotReady):
            await engine.explain(image(0), None, LATER)


class AtOnce(Executor):
    """A thread that is always faster than whoever asks it."""

    def submit(self, fn: Callable[..., T], /, *args: object, **kwargs: object) -> Future[T]:
        """Call ``fn`` before returning."""
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


async def test_an_explanation_is_open_before_its_thread_begins() -> None:
    """However early the thread runs, it finds that the request is wanted."""
    async with running_engine(FakeRunner()) as engine:
        explaining(engine).may_end.set()
        engine._explainer._thread = AtOnce()  # type: ignore[assignment]
        assert (await engine.explain(image(0), 1, time.monotonic() + 60)).label == 1
