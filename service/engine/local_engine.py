"""The engine itself: the bounded queue, the batches on the device, health and drain, over any ``Runner``.

``batching.py`` decides which requests form a batch and when it begins; ``open_requests.py`` ends each request exactly once.
What holds, and is tested:

- Every accepted request ends exactly once: result, error, deadline, cancellation or shutdown. A device that hangs keeps no
  request beyond its deadline.
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
from service.engine.device_stream import DeviceStream, Ended, Work
from service.engine.explainer import Explainer, Heatmap
from service.engine.interface import (
    Engine,
    EngineStatus,
    Explanation,
    Finish,
    ModelInfo,
    Prediction,
    Request,
    State,
    check_images,
)
from service.engine.open_requests import OpenRequests
from service.errors import QUEUE_FULL, DeadlineExceeded, InferenceFailed, NotReady, Overloaded, ServiceError
from service.model.class_activation import ClassActivation
from service.runtime.runner import Runner

logger = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
_RATE_WEIGHT = 0.2  # of the newest batch in the moving average of images per second


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner and what it serves. ``check`` raises unless the runner answers known images on that stream.

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
    """Made and used on one event loop."""

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

        ``on_batch`` is called with the images and compute seconds of every batch that ran; ``on_full`` with the seconds after
        which to retry each time the queue becomes full, and with 0 when it no longer is.
        """
        runner = model.runner
        self._model = model
        self._batching = Batching(runner.streams, runner.efficient_batch, runner.buckets, runner.lone)
        self._max_batch_size = runner.buckets[-1]
        self._max_queue_images = max_queue_images
        self._queue_delay_s = queue_delay_ms / 1000
        self._on_batch = on_batch
        self._on_full = on_full
        on_full(0)
        self._loop = asyncio.get_running_loop()
        self._requests = OpenRequests(self._withdraw)
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._waiting_images = 0
        self._is_full = False
        self._running: dict[int, _Batch] = {}
        self._dispatch_soon: asyncio.Handle | None = None
        self._dispatch_later: asyncio.TimerHandle | None = None
        self._state: State = "ready"
        self._images_per_s = 0.0
        self._failures = 0
        self._last_sound = time.monotonic()
        self._explainer = Explainer()
        self._streams = [DeviceStream(runner, number) for number in range(runner.streams)]

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
        self._requests.add(request)
        self._waiting[request] = None
        self._count_waiting(len(images))
        self._schedule_dispatch()
        return request

    def submit_explanation(
        self, image: NDArray[np.uint8], label: int | None, deadline: float, finish: Callable[[Explanation | ServiceError], None]
    ) -> Request:
        """See ``Engine.submit_explanation``; it uses neither the queue nor the device."""
        self._require_ready()
        model = self._model
        if model.maps is None:
            return super().submit_explanation(image, label, deadline, finish)
        if label is not None and label >= len(model.info.class_names):
            raise NotReady("the model has just been replaced by one with other classes; retry", retry_after_s=1)
        request = Request(image[None], deadline, finish)

        def end(outcome: Heatmap | InferenceFailed) -> None:
            explained = outcome if isinstance(outcome, InferenceFailed) else Explanation(outcome[1], outcome[0], model.info)
            self._requests.end(request.id, explained)

        self._requests.add(request)  # first: the thread drops what is not open
        try:
            self._explainer.begin(partial(model.maps.heatmap, image, label), lambda: request in self._requests, end)
        except Overloaded:
            self._requests.discard(request)
            raise
        return request

    def check_room(self) -> None:
        """See ``Engine.check_room``."""
        self._check_room_for(1)

    def cancel(self, request: Request) -> None:
        """See ``Engine.cancel``."""
        if self._requests.discard(request):
            self._withdraw(request)

    @property
    def waiting_images(self) -> int:
        """Number of images that wait for the device."""
        return self._waiting_images

    @property
    def backlog_s(self) -> float:
        """Seconds that the open requests will take at the measured rate; 0 before the first batch."""
        return self._requests.images / self._images_per_s if self._images_per_s else 0.0

    @property
    def longest_running_s(self) -> float:
        """Seconds that the oldest batch has been on the device; 0 when it is idle."""
        return max((time.monotonic() - batch.started for batch in self._running.values()), default=0.0)

    def check_if_idle(self, for_s: float) -> None:
        """Check every stream with known images if the device is idle and no batch has succeeded for ``for_s`` seconds."""
        idle = self._state == "ready" and not self._running and not self._waiting
        if idle and time.monotonic() - self._last_sound >= for_s:
            for stream in range(len(self._streams)):
                self._begin([], stream)

    def swap(self, model: LoadedModel) -> LoadedModel:
        """Serve ``model`` from the next batch on and return the old one; batches on the device end on the old one.

        Raises ValueError when it has another input size, other streams or another largest batch than the old one.
        """
        old = self._model
        if (model.info.input.size, model.runner.streams, model.runner.buckets[-1]) != (
            old.info.input.size,
            old.runner.streams,
            old.runner.buckets[-1],
        ):
            raise ValueError("a model can only be replaced by one of the same input size, streams and largest batch")
        self._model = model
        return old

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing more, end what was accepted, and fail with NotReady what is left after ``timeout_s``."""
        if self._state != "failed":
            self._state = "draining"
        try:
            await asyncio.wait_for(self._requests.until_empty(), timeout_s)
        except TimeoutError:
            self._fail_all()

    def close(self) -> None:
        """Fail what is left and let the device's streams end; a hung one is left behind."""
        self._state = "failed"
        self._fail_all()
        self._explainer.close()
        for stream in self._streams:
            stream.close()

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise NotReady(f"the service is {self._state}; retry shortly", retry_after_s=1)

    def _check_room_for(self, images: int) -> None:
        self._require_ready()
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

    def _withdraw(self, request: Request) -> None:
        """Remove a request that has ended from the queue, if it still waits there."""
        if request in self._waiting:
            del self._waiting[request]
            self._count_waiting(-len(request.images))

    def _schedule_dispatch(self) -> None:
        """Dispatch at the end of this event-loop iteration, so that what arrives together runs together."""
        if len(self._running) == self._batching.concurrent_streams:
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
        self._requests.expire()
        running = {stream: batch.size for stream, batch in self._running.items()}
        while choice := self._batching.choose(map(_size, self._waiting), self._waiting_images, running):
            count, stream = choice
            requests = list(islice(self._waiting, count))
            for request in requests:
                del self._waiting[request]
            running[stream] = self._begin(requests, stream)
            self._count_waiting(-running[stream])

    def _begin(self, requests: list[Request], stream: int) -> int:
        """Begin a batch, or without requests a check of the device; return its number of images."""
        model, size = self._model, sum(map(_size, requests))
        batch = self._running[stream] = _Batch(model, requests, size, time.monotonic())
        images = [request.images for request in requests]
        check, end = partial(model.check, stream), partial(self._finish_batch, stream, batch)
        self._streams[stream].begin(Work(model.runner, images, check, end))
        return size

    def _finish_batch(self, stream: int, batch: _Batch, ended: Ended) -> None:
        del self._running[stream]
        compute_s = ended.at - batch.started
        self._note_health(ended)
        if batch.requests:
            streams = self._batching.concurrent_streams
            self._note_rate(batch.size * (streams if stream < streams else 1) / max(compute_s, 1e-6), ended)
            if self._on_batch is not None:
                self._on_batch(batch.size, compute_s)
        self._dispatch()  # first, so that the device computes while the results are handed on
        for request, outcome in zip(batch.requests, ended.outcomes, strict=True):
            if not isinstance(outcome, InferenceFailed):
                queue_s = batch.started - request.enqueued
                info, typicality = batch.model.info, None
                if info.unknown_threshold is not None:
                    outcome, typicality = outcome[:, :-1], outcome[:, -1]
                self._requests.end(request.id, Prediction(outcome, info, queue_s, compute_s, batch.size, typicality))
            else:
                self._requests.end(request.id, outcome)

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
            for request in self._empty_queue():
                self._requests.end(request.id, NotReady("the device failed; retry shortly", retry_after_s=1))

    def _empty_queue(self) -> list[Request]:
        waiting = list(self._waiting)
        self._waiting.clear()
        self._count_waiting(-self._waiting_images)
        return waiting

    def _fail_all(self) -> None:
        self._empty_queue()
        self._requests.end_all(NotReady("the service stopped before the prediction was ready; retry", retry_after_s=1))


def _size(request: Request) -> int:
    return len(request.images)
