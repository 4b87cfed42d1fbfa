"""What HTTP workers ask of an engine, in their own process or in another: requests in, predictions out."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.answers import Options, best_classes, rounded
from service.errors import QUEUE_FULL, DeadlineExceeded, NotReady, Overloaded, ServiceError, deadline_passed
from service.model.images import InputSpec

if TYPE_CHECKING:
    from service.model.checkpoint import Checkpoint

T = TypeVar("T")

State = Literal["starting", "ready", "draining", "failed"]
LIKELIEST = -1  # the class to explain
_ids = itertools.count(1)
_UINT8 = np.dtype(np.uint8)  # there is one such object


@dataclass(frozen=True)
class ModelInfo:
    """What responses say of the model that made them.

    An image whose typicality is below ``unknown_threshold`` is not known; None for a model without typicality. ``samples`` are
    its known images: label, and PNG in base64.
    """

    name: str
    version: str
    class_names: tuple[str, ...]
    input: InputSpec
    unknown_threshold: float | None = None
    samples: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, unknown_threshold: float | None = None) -> ModelInfo:
        """Return that of a checkpoint's model; ``unknown_threshold`` replaces the checkpoint's own."""
        metadata = checkpoint.metadata
        threshold = metadata.unknown_threshold if unknown_threshold is None else unknown_threshold
        known_from = None if checkpoint.typicality is None else threshold
        return cls(metadata.name, checkpoint.version, metadata.class_names, metadata.input, known_from)


@dataclass(frozen=True)
class EngineStatus:
    """What health reports. ``queue_depth`` counts waiting images; ``detail`` says in words what is wrong, if anything is."""

    state: State = "starting"
    model: ModelInfo | None = None
    device: str = ""
    runtime: str = ""
    queue_depth: int = 0
    detail: str = ""


class Load(Protocol):
    """How busy the engine is, written by the engine alone; its process keeps this in memory that the workers share."""

    waiting_images: int
    running_images: int
    images_per_s: float  # as measured; 0 before the first batch


@dataclass(slots=True)
class Prediction:
    """``probabilities`` is float32 (n, num_classes) for the request's n images; ``batch_size`` counts the batch's images.

    ``typicality`` is float32 (n,), 0 to 1; None for a model that has none.
    Never changed once made; not frozen, because a frozen dataclass takes four times as long to make.
    """

    probabilities: NDArray[np.float32]
    model: ModelInfo
    queue_s: float
    compute_s: float
    batch_size: int
    typicality: NDArray[np.float32] | None = None

    def known(self, row: int, options: Options) -> bool | None:
        """Whether image number ``row`` is known; None where the model cannot tell."""
        threshold = self.model.unknown_threshold
        if self.typicality is None or threshold is None:
            return None
        return float(self.typicality[row]) >= (threshold if options.threshold is None else options.threshold)

    def answer(self, row: int, options: Options, filename: str | None) -> dict[str, Any]:
        """Return the JSON object of image number ``row``, see ``service.schemas.Answer``."""
        best = best_classes(self.probabilities[row], self.model.class_names, options.top_k)
        answer: dict[str, Any] = {**best[0], "predictions": best}
        if self.typicality is not None and (known := self.known(row, options)) is not None:
            answer |= {"known": known, "typicality": rounded(float(self.typicality[row]))}
            if not known and options.unknown == "reject":
                answer |= {"label": None, "score": None}
        answer["filename"] = filename
        answer["model"] = {"name": self.model.name, "version": self.model.version}
        return answer


@dataclass(frozen=True, slots=True)
class Explanation:
    """``heatmap`` is float32 (size, size) in 0..1: where the model found what speaks for class number ``label``."""

    heatmap: NDArray[np.float32]
    label: int
    model: ModelInfo


Outcome = Prediction | Explanation | ServiceError
Finish = Callable[[Any], None]  # gets an Outcome


class Request:
    """One request. ``images`` is uint8 (n, 3, size, size), ``deadline`` a ``time.monotonic()`` in seconds.

    ``finish`` is called once with the outcome and must not raise. ``id`` fits in 32 bits. ``explain`` is None for a prediction;
    for an explanation of its only image it is the number of a class, or ``LIKELIEST``. ``size`` counts the images that the
    queue holds for it: an explanation has no place there.
    """

    __slots__ = ("deadline", "enqueued", "explain", "finish", "id", "images", "size")

    def __init__(
        self, images: NDArray[np.uint8], deadline: float, finish: Callable[[Any], None], explain: int | None = None
    ) -> None:
        self.id = next(_ids) & 0xFFFFFFFF
        self.images = images
        self.deadline = deadline
        self.finish = finish
        self.explain = explain
        self.size = len(images) if explain is None else 0
        self.enqueued = time.monotonic()


class OpenRequests:
    """The requests that an engine has accepted and not ended yet: each ends exactly once, at its deadline at the latest.

    Used on one event loop. All deadlines share one timer: nearly every one is met, so a timer for each request, set and
    cancelled, would be most of its cost. It goes off at the earliest deadline that was known when it was set, whether or not
    that request is still open, and is then set again for the earliest one that is.

    ``images`` is the sum of the sizes of all open requests.
    ``on_expired`` is called with each request whose deadline has passed, before its ``finish``: the engine removes it from
    wherever it waits.
    """

    def __init__(self, on_expired: Callable[[Request], None]) -> None:
        self.images = 0
        self._on_expired = on_expired
        self._open: dict[int, Request] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __len__(self) -> int:
        """Return the number of open requests."""
        return len(self._open)

    def __contains__(self, request: Request) -> bool:
        """Whether ``request`` has not ended; may be asked from any thread."""
        return request.id in self._open

    def add(self, request: Request) -> None:
        """Accept ``request``."""
        self._open[request.id] = request
        self.images += request.size
        if request.deadline < self._timer_at:
            self._set_timer(request.deadline)

    def end(self, id_: int, outcome: object) -> None:
        """Call ``finish`` of the request with this ``Request.id``, unless it has ended already."""
        request = self.remove(id_)
        if request is not None:
            request.finish(outcome)

    def end_all(self, error: ServiceError) -> None:
        """End every open request with ``error``."""
        for id_ in list(self._open):
            self.end(id_, error)
        self._set_timer(math.inf)

    def remove(self, id_: int) -> Request | None:
        """End the request with this ``Request.id`` without calling its ``finish``; return it, None if it has ended."""
        request = self._open.pop(id_, None)
        if request is not None:
            self.images -= request.size
        return request

    def expire(self) -> None:
        """End every request whose deadline has passed. Takes no time while there is none."""
        now = time.monotonic()
        if now < self._timer_at:
            return
        late = [request for request in self._open.values() if request.deadline <= now]
        for request in late:
            self._on_expired(request)
            self.end(request.id, deadline_passed())
        self._set_timer(min((request.deadline for request in self._open.values()), default=math.inf))

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, at
        if at < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer_at = 0.0  # the event loop's clock is coarser than the deadlines: it may ring a moment early
        self.expire()


class Engine(ABC):
    """What HTTP workers talk to, used on one event loop.

    Every request that was accepted ends exactly once: with its result, an error, DeadlineExceeded at its deadline, or
    ``cancel``. Callers need no timer of their own.
    """

    def __init__(self, load: Load, *, max_batch_size: int, max_queue_images: int, on_change: Callable[[], None]) -> None:
        """Accept ``max_queue_images`` waiting images at most; ``on_change`` is called after each change of the status."""
        self._load = load
        self._max_batch_size = max_batch_size
        self._max_queue_images = max_queue_images
        self._on_change = on_change
        self._status = EngineStatus()
        self._requests = OpenRequests(self._withdraw)

    @property
    def state(self) -> State:
        """The state as it is now."""
        return self._status.state

    @property
    def model(self) -> ModelInfo | None:
        """The model that serves now; None before there is one."""
        return self._status.model

    def status(self) -> EngineStatus:
        """Return all that health reports, as it is now."""
        return replace(self._status, state=self.state, queue_depth=self._load.waiting_images)

    def submit(
        self,
        images: NDArray[np.uint8],
        deadline: float,
        finish: Finish,
        explain: int | None = None,
        model: ModelInfo | None = None,
    ) -> Request:
        """Accept uint8 (n, 3, size, size), n at most ``max_batch_size``; ``finish`` is called once, on the event loop.

        ``finish`` gets a Prediction or a ServiceError. With ``explain``, the number of a class or LIKELIEST, it gets an
        Explanation of the only image. Raises NotReady, Overloaded (the queue is full), DeadlineExceeded (it could not be met),
        and ValueError for an array of another type or shape. An engine in another process passes its refusals to ``finish``.
        There is no check for room where ``model`` is what ``check_room`` has returned in this iteration of the event loop.
        """
        size = (model or self.check_room(len(images) if explain is None else 0)).input.size
        if images.dtype is not _UINT8 or images.shape[1:] != (3, size, size) or not 0 < len(images) <= self._max_batch_size:
            expected = f"uint8 (1..{self._max_batch_size}, 3, {size}, {size})"
            raise ValueError(f"a request is {expected}, not {images.dtype} {images.shape}")
        if time.monotonic() + self.backlog_s >= deadline:
            raise DeadlineExceeded("the deadline cannot be met with this backlog; retry later, or allow more time")
        request = Request(images, deadline, finish, explain)
        self._requests.add(request)
        try:
            self._begin(request)
        except ServiceError:
            self._requests.remove(request.id)
            raise
        return request

    def check_room(self, images: int = 1) -> ModelInfo:
        """Return the model; raise NotReady or Overloaded if there is no room for so many images now.

        Callers check before they decode an image.
        """
        state, model = self.state, self._status.model
        if state != "ready" or model is None:
            raise NotReady(f"the service is {state}; retry shortly", retry_after_s=1)
        # A worker's own requests count before the engine has seen them.
        waiting = max(self._load.waiting_images, self._requests.images - self._load.running_images)
        if images and waiting + images > self._max_queue_images:
            raise Overloaded(QUEUE_FULL, retry_after_s=max(1, math.ceil(self.backlog_s)))
        return model

    @property
    def backlog_s(self) -> float:
        """Seconds that the open requests will take at the measured rate; 0 before the first batch."""
        rate = self._load.images_per_s
        return max(self._requests.images, self._load.waiting_images) / rate if rate else 0.0

    def cancel(self, request: Request) -> None:
        """Drop a request: its ``finish`` is not called any more. A batch that is on the device already runs to its end."""
        if self._requests.remove(request.id) is not None:
            self._withdraw(request)

    async def explain(self, image: NDArray[np.uint8], label: int | None, deadline: float) -> Explanation:
        """Submit uint8 (3, size, size), and wait for its explanation by class ``label``, or by the likeliest class if None.

        Raises what ``submit`` raises, InferenceFailed and DeadlineExceeded. Cancelling the awaiting task cancels the request.
        """
        future: asyncio.Future[Explanation] = asyncio.get_running_loop().create_future()
        request = self.submit(image[None], deadline, partial(settle, future), LIKELIEST if label is None else label)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(request)
            raise

    @abstractmethod
    def _begin(self, request: Request) -> None:
        """Begin to work on an open request; raise ServiceError where that cannot be."""

    @abstractmethod
    def _withdraw(self, request: Request) -> None:
        """Forget a request that was cancelled or has expired."""

    def _set_status(self, status: EngineStatus) -> None:
        if status != self._status:
            self._status = status
            self._on_change()


def settle(future: asyncio.Future[T], outcome: T | Exception) -> None:
    """Set the result or the error of ``future``, unless its awaiting task was cancelled in the same event-loop iteration."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
