"""What HTTP workers ask of an engine, in their own process or in another: requests in, predictions out."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.answers import Options, best_classes, make_answer
from service.errors import NotFound, ServiceError
from service.model.images import InputSpec

T = TypeVar("T")

State = Literal["starting", "ready", "draining", "failed"]

_ids = itertools.count(1)


@dataclass(frozen=True)
class ModelInfo:
    """What responses say of the model that made them.

    An image whose typicality is below ``unknown_threshold`` is not known; None for a model without typicality.
    """

    name: str
    version: str
    class_names: tuple[str, ...]
    input: InputSpec
    unknown_threshold: float | None = None


@dataclass(frozen=True)
class EngineStatus:
    """What health reports. ``queue_depth`` counts waiting images; ``detail`` says in words what is wrong, if anything is."""

    state: State
    model: ModelInfo | None
    device: str
    runtime: str
    queue_depth: int
    detail: str = ""


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
        if self.typicality is None or self.model.unknown_threshold is None:
            return None
        return options.known(float(self.typicality[row]), self.model.unknown_threshold)

    def answer(self, row: int, options: Options, filename: str | None) -> dict[str, Any]:
        """Return the JSON object of image number ``row``, see ``service.schemas.Answer``."""
        best = best_classes(self.probabilities[row], self.model.class_names, options.top_k)
        typicality = None if self.typicality is None else float(self.typicality[row])
        known = self.known(row, options)
        return make_answer(best, self.model.name, self.model.version, filename, typicality, known, options.unknown == "reject")


@dataclass(frozen=True, slots=True)
class Explanation:
    """``heatmap`` is float32 (size, size) in 0..1: where the model found what speaks for class number ``label``."""

    heatmap: NDArray[np.float32]
    label: int
    model: ModelInfo


Outcome = Prediction | ServiceError
Finish = Callable[[Outcome], None]


class Request:
    """One accepted request. ``images`` is uint8 (n, 3, size, size), ``deadline`` a ``time.monotonic()`` in seconds.

    ``finish`` is called once with the outcome and must not raise. ``id`` fits in 32 bits.
    """

    __slots__ = ("deadline", "enqueued", "finish", "id", "images")

    def __init__(self, images: NDArray[np.uint8], deadline: float, finish: Callable[[Any], None]) -> None:
        self.id = next(_ids) & 0xFFFFFFFF
        self.images = images
        self.deadline = deadline
        self.finish = finish
        self.enqueued = time.monotonic()


class Engine(ABC):
    """What HTTP workers talk to.

    Every request that was accepted ends exactly once: with its result, an error, DeadlineExceeded at its deadline, or
    ``cancel``. Callers need no timer of their own.
    """

    @abstractmethod
    def status(self) -> EngineStatus:
        """Return the state as it is now."""

    @abstractmethod
    def submit(self, images: NDArray[np.uint8], deadline: float, finish: Finish) -> Request:
        """Accept uint8 (n, 3, size, size), n at most ``max_batch_size``; ``finish`` is called once, on the event loop.

        Raises NotReady, Overloaded (the queue is full) and DeadlineExceeded (it could not be met), and ValueError for an
        array of another type or shape.
        """

    def submit_explanation(
        self, image: NDArray[np.uint8], label: int | None, deadline: float, finish: Callable[[Explanation | ServiceError], None]
    ) -> Request:
        """Accept uint8 (3, size, size), to be explained by class ``label``, or by the likeliest class if None.

        ``finish`` is called once, on the event loop. Raises NotReady, Overloaded, and NotFound for a model that cannot be
        explained.
        """
        raise NotFound("the answers of this model cannot be explained")

    @abstractmethod
    def check_room(self) -> None:
        """Raise NotReady or Overloaded if ``submit`` would for one image now. Callers check before they decode an image."""

    @abstractmethod
    def cancel(self, request: Request) -> None:
        """Drop a request: its ``finish`` is not called any more. A batch that is on the device already runs to its end."""

    async def predict(self, images: NDArray[np.uint8], deadline: float) -> Prediction:
        """Submit, and wait for the prediction. Raises what ``submit`` raises, InferenceFailed and DeadlineExceeded.

        Cancelling the awaiting task cancels the request.
        """
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        return await self._wait(self.submit(images, deadline, partial(settle, future)), future)

    async def explain(self, image: NDArray[np.uint8], label: int | None, deadline: float) -> Explanation:
        """Like ``predict``, for ``submit_explanation``."""
        future: asyncio.Future[Explanation] = asyncio.get_running_loop().create_future()
        return await self._wait(self.submit_explanation(image, label, deadline, partial(settle, future)), future)

    async def _wait(self, request: Request, future: asyncio.Future[T]) -> T:
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(request)
            raise


def check_images(images: NDArray[np.uint8], size: int, max_batch_size: int) -> None:
    """Raise ValueError unless ``images`` is what ``Engine.submit`` accepts."""
    if images.dtype != np.uint8 or images.shape[1:] != (3, size, size) or not 0 < len(images) <= max_batch_size:
        raise ValueError(f"a request is uint8 (1..{max_batch_size}, 3, {size}, {size}), not {images.dtype} {images.shape}")


def settle(future: asyncio.Future[T], outcome: T | Exception) -> None:
    """Set the result or the error of ``future``, unless its awaiting task was cancelled in the same event-loop iteration."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
