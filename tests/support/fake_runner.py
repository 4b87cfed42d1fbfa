"""A device for tests of the engine: it answers with what it was asked, and when the test lets it.

Its images carry a number, and its answers carry that number back; it fails on demand.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.device_stream import LoadedModel
from service.engine.interface import Engine, ModelInfo, Prediction, settle
from service.engine.local_engine import LocalEngine
from service.model.checkpoint import Canary
from service.model.class_activation import ClassActivation
from service.model.images import InputSpec
from service.runtime.runner import PolledRunner, Runner, RunnerOptions

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KNOWN = 2**24 - 1  # the number of the image that checks the device
_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang


@dataclass
class OwnLoad:
    """The ``Load`` of an engine that no other process watches."""

    waiting_images: int = 0
    running_images: int = 0
    images_per_s: float = 0.0


class FakeRunner(Runner):
    """An answer says which image it is for and which runner made it.

    While it is ``held``, a batch stays on the device until ``let_go``. ``batches`` are the numbers of the images of
    every call, in the order the calls began, ``streams_taken`` their streams; ``fails`` is asked with those numbers whether
    the call raises.
    """

    def __init__(
        self,
        *,
        streams: int = 1,
        held: bool = False,
        mark: int = 0,
        max_batch_size: int = 64,
        efficient_batch: int = 64,
    ) -> None:
        super().__init__(RunnerOptions(streams=streams, max_batch_size=max_batch_size), "cpu", "fake", efficient_batch)
        self.fails: Callable[[Sequence[int]], bool] = lambda numbers: False
        self.batches: list[list[int]] = []
        self.streams_taken: list[int] = []
        self.mark = mark
        self._held = held
        self._may_end = 0
        self._news = threading.Condition()

    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """See ``Runner.run``."""
        numbers = [number_of_image(image) for image in images]
        with self._news:
            self.batches.append(numbers)
            self.streams_taken.append(stream)
            self._news.notify_all()
            self._news.wait_for(lambda: not self._held or self._may_end)
            self._may_end -= bool(self._may_end)
        if self.fails(numbers):
            raise RuntimeError("the device fails on demand")
        return np.stack([_answer(number, self.mark) for number in numbers])

    def close(self) -> None:
        """See ``Runner.close``."""
        self.open()

    def let_go(self, calls: int = 1) -> None:
        """Let as many calls end as ``calls`` says, those to come included."""
        with self._news:
            self._may_end += calls
            self._news.notify_all()

    def hold(self) -> None:
        """Keep every call from here on until it is let go."""
        with self._news:
            self._held, self._may_end = True, 0

    def open(self) -> None:
        """Let every call end from here on."""
        with self._news:
            self._held = False
            self._news.notify_all()

    async def until_batches(self, count: int) -> None:
        """Wait until that many calls have begun since the start."""
        begun = await asyncio.to_thread(self._wait_for_batches, count)
        assert begun, f"the device got {self.batches}, not {count} batches"

    def _wait_for_batches(self, count: int) -> bool:
        with self._news:
            return self._news.wait_for(lambda: len(self.batches) >= count, _PATIENCE_S)


class PolledFakeRunner(FakeRunner, PolledRunner):
    """The same, polled: a thread that the engine does not know of is the device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fails_at_once: Callable[[Sequence[int]], bool] = lambda numbers: False
        self._futures: dict[int, Future[NDArray[np.float32]]] = {}

    def begin(self, parts: Sequence[NDArray[np.uint8]], stream: int) -> None:
        """See ``PolledRunner.begin``."""
        together = np.concatenate(parts)
        if self.fails_at_once([number_of_image(image) for image in together]):
            raise RuntimeError("the device takes nothing on demand")
        assert stream not in self._futures, "one batch at a time"
        future = self._futures[stream] = Future()
        threading.Thread(target=self._run_for, args=(future, together, stream), daemon=True).start()

    def look(self, stream: int) -> NDArray[np.float32] | None:
        """See ``PolledRunner.look``."""
        return self._futures.pop(stream).result() if self._futures[stream].done() else None

    def _run_for(self, future: Future[NDArray[np.float32]], together: NDArray[np.uint8], stream: int) -> None:
        try:
            future.set_result(self.run(together, stream))
        except RuntimeError as error:
            future.set_exception(error)


def image(number: int, size: int = 32) -> NDArray[np.uint8]:
    """Return an image that carries ``number``, below 2**24: uint8 (3, size, size)."""
    pixels = np.zeros((3, size, size), np.uint8)
    pixels[:, 0, 0] = np.frombuffer(number.to_bytes(3, "little"), np.uint8)
    return pixels


def images(*numbers: int, size: int = 32) -> NDArray[np.uint8]:
    """Return the images of these numbers: uint8 (n, 3, size, size)."""
    return np.stack([image(number, size) for number in numbers])


def number_of_image(pixels: NDArray[np.uint8]) -> int:
    """Return the number that an ``image`` carries."""
    return int.from_bytes(pixels[:, 0, 0].tobytes(), "little")


def numbers_of(probabilities: NDArray[np.float32]) -> list[int]:
    """Return the numbers of the images that these answers, float32 (n, num_classes), are for."""
    return [round(float(row[0]) * 2**25) for row in probabilities]


def mark_of(probabilities: NDArray[np.float32]) -> int:
    """Return the mark of the runner that made the first of these answers."""
    return round(float(probabilities[0, 1]) * 2**8)


def _answer(number: int, mark: int) -> NDArray[np.float32]:
    """Return a distribution over the classes whose first two entries carry ``number`` and ``mark`` exactly."""
    row = np.zeros(len(CLASS_NAMES), np.float32)
    row[0], row[1] = number / 2**25, mark / 2**8
    row[2] = 1 - row.sum()
    return row


class _NoMaps(ClassActivation):
    """Maps of no network; a test of explanations brings its own."""

    def __init__(self) -> None: ...


def fake_model(runner: FakeRunner, version: str = "0123456789ab") -> LoadedModel:
    """Return ``runner`` with the description of a model of 32x32 images; its known image is number ``KNOWN``."""
    known = Canary(images(KNOWN), _answer(KNOWN, runner.mark)[None])
    return LoadedModel(runner, ModelInfo("fake", version, CLASS_NAMES, InputSpec()), known, _NoMaps())


@asynccontextmanager
async def running_engine(runner: FakeRunner, *, version: str = "0123456789ab", **limits: Any) -> AsyncIterator[LocalEngine]:
    """Run an engine over ``runner`` with these ``limits``; leave no thread behind."""
    engine = LocalEngine(fake_model(runner, version), **{"load": OwnLoad(), **limits})
    try:
        yield engine
    finally:
        engine.close()
        runner.open()


async def predict(engine: Engine, images: NDArray[np.uint8], deadline: float) -> Prediction:
    """Submit ``images``, and wait for the prediction; cancelling the awaiting task cancels the request."""
    future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
    request = engine.submit(images, deadline, partial(settle, future))
    try:
        return await future
    finally:
        engine.cancel(request)
