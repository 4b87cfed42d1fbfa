"""The queue and the batching, over any ``Runner``.

Owns: the bounded queue, batches, deadlines, cancellation, failures, drain. Does not know: torch, HTTP, processes.

No timer forms a batch: while the device is busy, requests gather; when a stream of it is free, it takes what waits, up to
``max_batch_size``. Where a larger batch gains nothing (``Runner.efficient_batch``), it takes its share and no padding: one
batch that holds every request leaves the other streams, and whoever writes the answers, without work. Where too little
is here for a request, or an efficient batch, on each stream, one batch at a time takes the cores of all
(``Runner.wide_stream``). What holds, and is tested:

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

import numpy as np
from numpy.typing import NDArray

from service.cpu import available_cores
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
from service.runtime.runner import Runner, all_streams

logger = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
_RATE_WEIGHT = 0.2  # of the newest batch in the moving average of images per second
_SHARES_PER_STREAM = 1.5  # two thirds of what is here run while the rest is carried in and out
_PEAK_KEPT = 0.98  # of the most images, and requests, that were here at once, with each batch


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
        max_batch_size: int = 64,
        max_queue_images: int = 1024,
        queue_delay_ms: float = 0.0,
        cores: int = 0,
        on_batch: Callable[[int, float], None] | None = None,
        on_full: Callable[[int], None] = lambda retry_after_s: None,
    ) -> None:
        """Open the device's streams.

        ``cores`` are shared with the HTTP workers by a runner whose streams take cores; 0 are those of this process.
        ``on_batch`` is told the images and compute seconds of every batch that ran; ``on_full`` when to retry, in whole
        seconds, each time the queue becomes full, and 0 when it no longer is.
        """
        self._model = model
        self._max_batch_size = max_batch_size
        self._max_queue_images = max_queue_images
        self._queue_delay_s = queue_delay_ms / 1000
        self._cores = cores or available_cores()
        self._on_batch = on_batch
        self._on_full = on_full
        self._loop = asyncio.get_running_loop()
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._waiting_images = 0
        self._is_full = False
        on_full(0)
        self._running: dict[int, _Batch] = {}
        self._idle = list(range(model.runner.streams))
        self._dispatch_handle: asyncio.Handle | None = None
        self._state: State = "ready"
        self._images_per_s = 0.0
        self._peak_images = 0.0
        self._peak_requests = 0.0
        self._failures = 0
        self._last_sound = time.monotonic()
        self._drained = asyncio.Event()
        self._explainer = Explainer()
        self._streams = [open_stream(model.runner, stream) for stream in all_streams(model.runner)]

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
    def _requests_here(self) -> int:
        """How many requests wait or run."""
        return len(self._waiting) + sum(len(batch.requests) for batch in self._running.values())

    @property
    def longest_running_s(self) -> float:
        """How long the oldest batch has been on the device, in seconds; 0 when it is idle."""
        return max((time.monotonic() - batch.started for batch in self._running.values()), default=0.0)

    def check_if_idle(self, for_s: float) -> None:
        """Have every stream answer a known image when the device is idle and has not proved sound for ``for_s`` seconds."""
        idle = self._state == "ready" and not self._running and not self._waiting
        if idle and time.monotonic() - self._last_sound >= for_s:
            for stream in all_streams(self._model.runner):
                self._begin([], stream)

    def swap(self, model: LoadedModel) -> LoadedModel:
        """Serve ``model`` from the next batch on and give the old one back; batches in flight end on the old one.

        Raises ValueError when it has another input size, or other streams, than the one it replaces.
        """
        old = self._model
        if model.info.input.size != old.info.input.size or all_streams(model.runner) != all_streams(old.runner):
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
        """Dispatch at the end of this turn of the loop, so that what arrives together runs together."""
        if not self._idle:
            return
        if self._queue_delay_s and self._waiting_images < self._max_batch_size:
            if self._dispatch_handle is None:
                self._dispatch_handle = self._loop.call_later(self._queue_delay_s, self._dispatch)
        elif self._dispatch_handle is None or isinstance(self._dispatch_handle, asyncio.TimerHandle):
            self._stop_dispatch()
            self._dispatch_handle = self._loop.call_soon(self._dispatch)

    def _stop_dispatch(self) -> None:
        if self._dispatch_handle is not None:
            self._dispatch_handle.cancel()
            self._dispatch_handle = None

    def _dispatch(self) -> None:
        self._stop_dispatch()
        while self._waiting:
            beside = self._useful_streams()
            wide = self._model.runner.wide_stream if self._are_few(beside) else None
            if wide is not None:
                beside = 1
            if len(self._running) >= beside:
                break
            requests = self._take_batch(beside)
            if not requests:
                break
            # Of the others the one that ran last: its weights are in the caches.
            self._begin(requests, self._idle[-1] if wide is None else wide)
        self._note_if_drained()

    def _begin(self, requests: list[Request], stream: int) -> None:
        if stream in self._idle:
            self._idle.remove(stream)
        model, parts = self._model, [request.images for request in requests]
        batch = _Batch(model, requests, sum(map(len, parts)), time.monotonic())
        self._running[stream] = batch
        check, end = partial(model.check, stream), partial(self._finish_batch, stream, batch)
        self._streams[stream].begin(Work(model.runner, parts, check, end))

    def _take_batch(self, beside: int) -> list[Request]:
        """Take waiting requests in order, as many as make a good batch; what has expired ends here."""
        now = time.monotonic()
        batch: list[Request] = []
        room = self._good_batch_size(beside)
        while self._waiting:
            request = next(iter(self._waiting))
            if batch and request.deadline > now and len(request.images) > room:
                break
            del self._waiting[request]
            self._count_waiting(-len(request.images))
            if request.deadline <= now:
                request.finish(deadline_passed())
                continue
            room -= len(request.images)
            batch.append(request)
        return batch

    def _useful_streams(self) -> int:
        """Give how many batches may run beside each other.

        Where streams take no core, another batch begins when it is full: before, it would take more of this process for each
        image than it would gain on the device. Where a stream takes a core, it is their share of the cores: what the waiting
        images are of all the work, each request being as much to its HTTP worker as ``Runner.request_cost`` images to a
        stream. A stream more would take the time of those that bring its images and carry its answers away.
        """
        runner = self._model.runner
        if not runner.request_cost:
            return runner.streams if self._waiting_images >= self._max_batch_size else 1
        images = self._waiting_images / len(self._waiting)
        share = images / (images + runner.request_cost)
        return min(runner.streams, max(1, round(self._cores * share)))

    def _are_few(self, beside: int) -> bool:
        """Whether too little is here for ``beside`` streams: not a request for each, or not an efficient batch of images.

        Then one batch on the cores of all is sooner done, and takes less of them for an image than some of one or two.
        """
        requests = max(self._requests_here, round(self._peak_requests))
        images = max(self._images_here, self._peak_images)
        efficient = _SHARES_PER_STREAM * self._model.runner.efficient_batch
        return beside > 1 and (requests < beside or images < beside * efficient)

    def _good_batch_size(self, beside: int) -> int:
        """Give the images of the next batch: all that wait, or a share of them where a larger batch gains nothing.

        The share is of the most that were here at once lately: in a closed loop the others are on their way back.
        """
        self._peak_images = max(self._images_here, self._peak_images * _PEAK_KEPT)
        self._peak_requests = max(self._requests_here, self._peak_requests * _PEAK_KEPT)
        runner = self._model.runner
        share = math.ceil(self._peak_images / (_SHARES_PER_STREAM * beside))
        size = min(self._waiting_images, self._max_batch_size, max(runner.efficient_batch, share))
        if size <= runner.efficient_batch:
            return size
        return max(bucket for bucket in runner.buckets if bucket <= size)

    def _finish_batch(self, stream: int, batch: _Batch, ended: Ended) -> None:
        del self._running[stream]
        wide = stream == batch.model.runner.wide_stream
        if not wide:
            self._idle.append(stream)
        compute_s, size = ended.at - batch.started, batch.size
        self._note_health(ended)
        if size:
            beside = 1 if wide else batch.model.runner.streams
            self._note_rate(size * beside / max(compute_s, 1e-6), ended)
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


def _nobody_listens(outcome: Outcome) -> None:
    """Take the outcome of a request that has ended another way."""
