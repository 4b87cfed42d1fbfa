"""The queue and the batching, over any ``Runner``.

Owns: the bounded queue, batches, deadlines, cancellation, failures, drain. Does not know: torch, HTTP, processes.

Which requests form a batch, and when it begins, is decided by ``batching.py``. What holds, and is tested:

- Every accepted request ends exactly once: result, error, deadline, cancellation or shutdown.
- ``finish`` is called on the event loop and nowhere else; the results of a batch come back in one call to the loop.
- A request that was cancelled or whose deadline passed never reaches the device.
- A failing batch is run again by halves, so that it fails only its culprit, and the engine lives on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from service.engine.batching import Batching
from service.engine.device_stream import Ended, Work, open_stream
from service.engine.explainer import Explainer
from service.engine.interface import (
    Engine,
    EngineStatus,
    Explanation,
    Finish,
    ModelInfo,
    Outcome,
    Prediction,
    Request,
    State,
    check_images,
)
from service.errors import (
    QUEUE_FULL,
    DeadlineExceeded,
    InferenceFailed,
    NotReady,
    Overloaded,
    ServiceError,
    deadline_passed,
)
from service.model.class_activation import ClassActivation
from service.runtime.runner import Runner

logger = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
_RATE_WEIGHT = 0.2  # of the newest batch in the moving average of images per second


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner and what it serves; ``check`` asks it on a stream for an answer that is known and raises on any other.

    ``maps`` explain its answers, where the architecture allows it.
    """

    runner: Runner
    info: ModelInfo
    check: Callable[[int], None]
    maps: ClassActivation | None = None


@dataclass(slots=True)
class _Batch:
    """What one stream works on; without requests it is a check of the device."""

    model: LoadedModel
    requests: list[Request]
    size: int  # in images
    started: float


class LocalEngine(Engine):
    """The engine itself. Made and used on one event loop."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_queue_images: int = 1024,
        queue_delay_ms: float = 0.0,
        on_batch: Callable[[int, float], None] | None = None,
        on_full: Callable[[int], None] = lambda retry_after_s: None,
    ) -> None:
        """Open the device's streams.

        ``on_batch`` is told the images and compute seconds of every batch that ran; ``on_full`` when to retry, in whole
        seconds, each time the queue becomes full, and 0 when it no longer is.
        """
        self._model = model
        runner = model.runner
        self._batching = Batching(runner.streams, runner.efficient_batch, runner.buckets)
        self._max_batch_size = runner.buckets[-1]
        self._max_queue_images = max_queue_images
        self._queue_delay_s = queue_delay_ms / 1000
        self._on_batch = on_batch
        self._on_full = on_full
        self._loop = asyncio.get_running_loop()
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._waiting_images = 0
        self._is_full = False
        on_full(0)
        self._running: dict[int, _Batch] = {}
        self._dispatch_soon: asyncio.Handle | None = None
        self._dispatch_later: asyncio.TimerHandle | None = None
        self._state: State = "ready"
        self._images_per_s = 0.0
        self._failures = 0
        self._last_sound = time.monotonic()
        self._drained = asyncio.Event()
        self._explainer = Explainer()
        self._streams = [open_stream(model.runner, stream) for stream in range(runner.streams)]

    def status(self) -> EngineStatus:
        """See ``Engine.status``."""
        runner = self._model.runner
        return EngineStatus(self._state, self._model.info, runner.device, runner.runtime, self._waiting_images)

    def submit(self, images: NDArray[np.uint8], deadline: float, finish: Finish) -> Request:
        """See ``Engine.submit``; the bound is exact and counts waiting images."""
        check_images(images, self._model.info.input.size, self._max_batch_size)
        self._check_room_for(len(images))
        if time.monotonic() + self.backlog_s >= deadline:
            raise DeadlineExceeded("the deadline cannot be met with this backlog; retry later, or allow more time")
        request = Request(images, deadline, finish)
        self._waiting[request] = None
        self._count_waiting(len(images))
        self._schedule_dispatch()
        return request

    def check_room(self) -> None:
        """See ``Engine.check_room``."""
        self._check_room_for(1)

    def cancel(self, request: Request) -> None:
        """See ``Engine.cancel``."""
        request.finish = _nobody_listens
        if request in self._waiting:
            del self._waiting[request]
            self._count_waiting(-len(request.images))
            self._note_if_drained()

    async def explain(self, image: NDArray[np.uint8], label: int | None, deadline: float) -> Explanation:
        """See ``Engine.explain``."""
        model = self._model
        if self._state != "ready":
            raise NotReady(f"the service is {self._state}; retry shortly", retry_after_s=1)
        if model.maps is None:
            return await super().explain(image, label, deadline)
        if label is not None and label >= len(model.info.class_names):
            raise NotReady("the model has just been replaced by one with other classes; retry", retry_after_s=1)
        label, heatmap = await self._explainer.heatmap(model.maps, image, label, deadline)
        return Explanation(heatmap, label, model.info)

    @property
    def waiting_images(self) -> int:
        """How many images wait for the device."""
        return self._waiting_images

    @property
    def backlog_s(self) -> float:
        """How long what waits and runs will take at the measured rate, in seconds; 0 before the first batch."""
        if not self._images_per_s:
            return 0.0
        return self._images_here / self._images_per_s

    @property
    def _images_here(self) -> int:
        """How many images wait or run."""
        return self._waiting_images + sum(batch.size for batch in self._running.values())

    @property
    def longest_running_s(self) -> float:
        """How long the oldest batch has been on the device, in seconds; 0 when it is idle."""
        return max((time.monotonic() - batch.started for batch in self._running.values()), default=0.0)

    def check_if_idle(self, for_s: float) -> None:
        """Have every stream answer a known image when the device is idle and has not proved sound for ``for_s`` seconds."""
        idle = self._state == "ready" and not self._running and not self._waiting
        if idle and time.monotonic() - self._last_sound >= for_s:
            for stream in range(self._model.runner.streams):
                self._begin([], stream)

    def swap(self, model: LoadedModel) -> LoadedModel:
        """Serve ``model`` from the next batch on and give the old one back; batches in flight end on the old one.

        Raises ValueError when it has another input size, or other streams, than the one it replaces.
        """
        old = self._model
        if model.info.input.size != old.info.input.size or model.runner.streams != old.runner.streams:
            raise ValueError("a model can only be replaced by one of the same input size and the same streams")
        self._model = model
        return old

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing more, answer what was accepted, and fail with NotReady what is left after ``timeout_s``."""
        if self._state != "failed":
            self._state = "draining"
        self._note_if_drained()
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            self._fail_all(NotReady("the service stopped before the prediction was ready; retry", retry_after_s=1))

    def close(self) -> None:
        """Fail what is left and let the device's streams end; a hung one is left behind."""
        self._state = "failed"
        self._fail_all(NotReady("the service stopped before the prediction was ready; retry", retry_after_s=1))
        self._explainer.close()
        for stream in self._streams:
            stream.close()

    def _check_room_for(self, images: int) -> None:
        if self._state != "ready":
            raise NotReady(f"the service is {self._state}; retry shortly", retry_after_s=1)
        if self._waiting_images + images > self._max_queue_images:
            raise Overloaded(QUEUE_FULL, retry_after_s=self._retry_after_s)

    @property
    def _retry_after_s(self) -> int:
        return max(1, math.ceil(self.backlog_s))

    def _count_waiting(self, images: int) -> None:
        self._waiting_images += images
        if self._is_full != (self._waiting_images >= self._max_queue_images):
            self._is_full = not self._is_full
            self._on_full(self._retry_after_s if self._is_full else 0)

    def _schedule_dispatch(self) -> None:
        """Dispatch at the end of this event-loop iteration, so that what arrives together runs together."""
        if len(self._running) == len(self._streams):
            return
        if self._queue_delay_s and self._waiting_images < self._max_batch_size:
            if self._dispatch_later is None:
                self._dispatch_later = self._loop.call_later(self._queue_delay_s, self._dispatch)
        elif self._dispatch_soon is None:
            self._dispatch_soon = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        for handle in (self._dispatch_soon, self._dispatch_later):
            if handle is not None:
                handle.cancel()
        self._dispatch_soon = self._dispatch_later = None
        self._expire_waiting()
        running = {stream: batch.size for stream, batch in self._running.items()}
        while choice := self._batching.choose(map(_size, self._waiting), self._waiting_images, running):
            count, stream = choice
            requests = list(islice(self._waiting, count))
            for request in requests:
                del self._waiting[request]
            running[stream] = sum(map(_size, requests))
            self._count_waiting(-running[stream])
            self._begin(requests, stream)
        self._note_if_drained()

    def _begin(self, requests: list[Request], stream: int) -> None:
        model, parts = self._model, [request.images for request in requests]
        batch = _Batch(model, requests, sum(map(_size, requests)), time.monotonic())
        self._running[stream] = batch
        check, end = partial(model.check, stream), partial(self._finish_batch, stream, batch)
        self._streams[stream].begin(Work(model.runner, parts, check, end))

    def _expire_waiting(self) -> None:
        now = time.monotonic()
        for request in [request for request in self._waiting if request.deadline <= now]:
            del self._waiting[request]
            self._count_waiting(-len(request.images))
            request.finish(deadline_passed())

    def _finish_batch(self, stream: int, batch: _Batch, ended: Ended) -> None:
        del self._running[stream]
        compute_s, size = ended.at - batch.started, batch.size
        self._note_health(ended)
        if size:
            self._note_rate(size * batch.model.runner.streams / max(compute_s, 1e-6), ended)
            if self._on_batch is not None:
                self._on_batch(size, compute_s)
        self._dispatch()  # the device first: what waits is already here, and answers can be written while it computes
        for request, outcome in zip(batch.requests, ended.outcomes, strict=True):
            if isinstance(outcome, InferenceFailed):
                request.finish(outcome)
            else:
                queue_s = batch.started - request.enqueued
                request.finish(Prediction(outcome, batch.model.info, queue_s, compute_s, size))

    def _note_rate(self, images_per_s: float, ended: Ended) -> None:
        if not any(isinstance(outcome, InferenceFailed) for outcome in ended.outcomes):  # a failure is quick, or slow
            self._images_per_s += (images_per_s - self._images_per_s) * (_RATE_WEIGHT if self._images_per_s else 1.0)

    def _note_health(self, ended: Ended) -> None:
        if not ended.device_failed:
            self._failures = 0
            self._last_sound = ended.at
            return
        self._failures += 1
        if self._failures >= _FAILURES_UNTIL_DEAD and self._state != "failed":
            logger.error("device failed %d times in a row, known images included", self._failures)
            self._state = "failed"
            self._fail_waiting(NotReady("the device failed; retry shortly", retry_after_s=1))

    def _note_if_drained(self) -> None:
        if self._state in ("draining", "failed") and not self._waiting and not self._running:
            self._drained.set()

    def _fail_waiting(self, error: ServiceError) -> None:
        waiting, self._waiting = self._waiting, OrderedDict()
        self._count_waiting(-self._waiting_images)
        for request in waiting:
            request.finish(error)

    def _fail_all(self, error: ServiceError) -> None:
        self._fail_waiting(error)
        for batch in self._running.values():
            for request in batch.requests:
                finish, request.finish = request.finish, _nobody_listens
                finish(error)


def _size(request: Request) -> int:
    return len(request.images)


def _nobody_listens(outcome: Outcome) -> None:
    """Take the outcome of a request that has ended another way."""
