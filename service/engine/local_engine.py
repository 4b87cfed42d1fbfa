"""The engine itself: the bounded queue, the batches on the device, and health, over any ``Runner``.

``batching.py`` decides which requests form a batch and when it begins; ``OpenRequests`` ends each request exactly once.
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
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import attrgetter

from service.engine.batching import Batching
from service.engine.device_stream import Batch, DeviceStream, LoadedModel
from service.engine.explainer import Explainer
from service.engine.interface import LIKELIEST, Engine, EngineStatus, Explanation, Load, Prediction, Request
from service.errors import InferenceFailed, NotReady
from service.model.typicality import split_output

logger = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
_SIZE: Callable[[Request], int] = attrgetter("size")
_IDLE_S = 0.5  # without a batch
_RATE_WEIGHT = 0.2  # of the newest batch in the moving average of images per second


class LocalEngine(Engine):
    """Made and used on one event loop."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        load: Load,
        max_queue_images: int = 1024,
        queue_delay_ms: float = 0.0,
        on_batch: Callable[[int, float], None] = lambda images, compute_s: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the device's streams.

        ``on_batch`` is called with the images and compute seconds of every batch that ran, ``on_change`` after each change of
        the status.
        """
        runner = model.runner
        super().__init__(load, max_batch_size=runner.buckets[-1], max_queue_images=max_queue_images, on_change=on_change)
        self._status = _status_of(model)
        self._serving = model
        self._batching = Batching(runner.streams, runner.efficient_batch, runner.buckets, runner.lone)
        self._queue_delay_s = queue_delay_ms / 1000
        self._on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._running: dict[int, Batch] = {}
        self._dispatch_soon: asyncio.Handle | None = None
        self._dispatch_later: asyncio.TimerHandle | None = None
        self._failures = 0
        self._last_sound = time.monotonic()
        self._explainer = Explainer(self._is_idle)
        self._streams = [DeviceStream(number, self._finish_batch) for number in range(runner.streams)]

    @property
    def longest_running_s(self) -> float:
        """Seconds that the oldest batch has been on the device; 0 when it is idle."""
        return max((time.monotonic() - batch.started for batch in self._running.values()), default=0.0)

    def check_if_idle(self, for_s: float) -> None:
        """Check every stream with known images if the device is idle and no batch has succeeded for ``for_s`` seconds."""
        idle = self.state == "ready" and not self._running and not self._waiting
        if idle and time.monotonic() - self._last_sound >= for_s:
            for stream in range(len(self._streams)):
                self._begin_batch([], stream)

    def swap(self, model: LoadedModel) -> None:
        """Serve ``model`` from the next batch on; batches on the device end on the old one.

        It has the input size, the streams and the largest batch of the old one, as ``ModelStore`` requires.
        """
        self._serving = model
        self._set_status(replace(_status_of(model), state=self.state))

    def report(self, detail: str) -> None:
        """Say in words, in the status, what is wrong; empty if nothing is."""
        self._set_status(replace(self._status, detail=detail))

    def close(self) -> None:
        """Fail what is left and let the device's streams end; a hung one is left behind."""
        error = NotReady("the service stopped before the prediction was ready; retry", retry_after_s=1)
        self._fail(error)
        self._requests.end_all(error)
        self._explainer.close()
        for stream in self._streams:
            stream.close()

    def _begin(self, request: Request) -> None:
        """See ``Engine._begin``; explanations use neither the queue nor the device."""
        if request.explain is not None:
            self._explain(request, request.explain)
        else:
            self._waiting[request] = None
            self._load.waiting_images += request.size
            self._schedule_dispatch()

    def _explain(self, request: Request, label: int) -> None:
        model = self._serving
        if label >= len(model.info.class_names):
            raise NotReady("the model has just been replaced by one with other classes; retry", retry_after_s=1)

        def make() -> Explanation:
            explained, heatmap = model.maps.heatmap(request.images[0], None if label == LIKELIEST else label)
            return Explanation(heatmap, explained, model.info)

        self._explainer.begin(make, lambda: request in self._requests, partial(self._requests.end, request.id))

    def _withdraw(self, request: Request) -> None:
        """Remove a request that has ended from the queue, if it still waits there."""
        if request in self._waiting:
            del self._waiting[request]
            self._load.waiting_images -= request.size

    def _schedule_dispatch(self) -> None:
        """Dispatch at the end of this event-loop iteration, so that what arrives together runs together."""
        if len(self._running) == self._batching.concurrent_streams:
            return
        if self._queue_delay_s and self._load.waiting_images < self._max_batch_size:
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
        while choice := self._batching.choose(map(_SIZE, self._waiting), self._load.waiting_images, running):
            count, stream = choice
            requests = list(islice(self._waiting, count))
            for request in requests:
                del self._waiting[request]
            running[stream] = self._begin_batch(requests, stream)
            self._load.waiting_images -= running[stream]

    def _is_idle(self) -> bool:
        return not self._running and not self._waiting and time.monotonic() - self._last_sound > _IDLE_S

    def _begin_batch(self, requests: list[Request], stream: int) -> int:
        """Begin a batch, or without requests a check of the device; return its number of images."""
        size = sum(map(_SIZE, requests))
        batch = self._running[stream] = Batch(self._serving, stream, requests, size, time.monotonic())
        self._load.running_images += size
        self._streams[stream].begin(batch)
        return size

    def _finish_batch(self, batch: Batch) -> None:
        del self._running[batch.stream]
        self._load.running_images -= batch.size
        compute_s = batch.ended - batch.started
        self._note_health(batch)
        if batch.requests:
            streams = self._batching.concurrent_streams
            self._note_rate(batch.size * (streams if batch.stream < streams else 1) / max(compute_s, 1e-6), batch)
            self._on_batch(batch.size, compute_s)
        self._dispatch()  # first, so that the device computes while the results are handed on
        info, classes = batch.model.info, len(batch.model.info.class_names)
        for request, outcome in zip(batch.requests, batch.outcomes, strict=True):
            if not isinstance(outcome, InferenceFailed):
                queue_s = batch.started - request.enqueued
                probabilities, typicality = split_output(outcome, classes)
                self._requests.end(request.id, Prediction(probabilities, info, queue_s, compute_s, batch.size, typicality))
            else:
                self._requests.end(request.id, outcome)

    def _note_rate(self, images_per_s: float, batch: Batch) -> None:
        if not any(isinstance(outcome, InferenceFailed) for outcome in batch.outcomes):  # a failure is quick, or slow
            load = self._load
            load.images_per_s += (images_per_s - load.images_per_s) * (_RATE_WEIGHT if load.images_per_s else 1.0)

    def _note_health(self, batch: Batch) -> None:
        if not batch.device_failed:
            self._failures = 0
            self._last_sound = batch.ended
            return
        self._failures += 1
        if self._failures >= _FAILURES_UNTIL_DEAD and self.state != "failed":
            logger.error("device failed %d times in a row, known images included", self._failures)
            self._fail(NotReady("the device failed; retry shortly", retry_after_s=1))

    def _fail(self, error: NotReady) -> None:
        """Accept nothing more, and end what waits."""
        self._set_status(replace(self._status, state="failed"))
        for request in list(self._waiting):
            self._withdraw(request)
            self._requests.end(request.id, error)


def _status_of(model: LoadedModel) -> EngineStatus:
    return EngineStatus("ready", model.info, model.runner.device, model.runner.runtime)
