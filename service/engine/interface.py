"""What HTTP workers ask of an engine, in their own process or in another: requests in, predictions out."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import (
    DeadlineExceeded,
    NotFound,
    ServiceError,
    deadline_passed,
)
from service.model.images import InputSpec

T = TypeVar("T")


State = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True)
class ModelInfo:
    """What answers say of the model that made them."""

    name: str
    version: str
    class_names: tuple[str, ...]
    input: InputSpec


@dataclass(frozen=True)
class EngineStatus:
    """What health reports; ``queue_depth`` counts waiting images, ``detail`` says in words what is not as it should be."""

    state: State
    model: ModelInfo | None
    device: str
    runtime: str
    queue_depth: int
    detail: str = ""


@dataclass(slots=True)
class Prediction:
    """``probabilities`` is float32 (n, num_classes) for the request's n images; ``batch_size`` counts the batch's images.

    Never changed once made; not frozen, which takes four times as long to make, since there is one for every request.
    """

    probabilities: NDArray[np.float32]
    model: ModelInfo
    queue_s: float
    compute_s: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """``heatmap`` is float32 (size, size) in 0..1: where the model found what speaks for class number ``label``."""

    heatmap: NDArray[np.float32]
    label: int
    model: ModelInfo


Outcome = Prediction | ServiceError


Finish = Callable[[Outcome], None]


class Request:
    """One accepted request: ``images`` is uint8 (n, 3, size, size), ``deadline`` a ``time.monotonic()`` in seconds."""

    __slots__ = ("deadline", "enqueued", "finish", "images")

    def __init__(self, images: NDArray[np.uint8], deadline: float, finish: Finish) -> None:
        self.images = images
        self.deadline = deadline
        self.finish = finish
        self.enqueued = time.monotonic()


class Engine(ABC):
    """What HTTP workers talk to, in this process or in another."""

    @abstractmethod
    def status(self) -> EngineStatus:
        """Give the state as it is now."""

    @abstractmethod
    def submit(self, images: NDArray[np.uint8], deadline: float, finish: Finish) -> Request:
        """Accept uint8 (n, 3, size, size), n at most ``max_batch_size``; ``finish`` is called once, on the event loop.

        Raises NotReady, Overloaded (the queue is full) and DeadlineExceeded (it could not be met), and ValueError for an
        array of another type or shape.
        """

    @abstractmethod
    def check_room(self) -> None:
        """Raise NotReady or Overloaded if ``submit`` would now, for one image; who asks first prepares none in vain."""

    @abstractmethod
    def cancel(self, request: Request) -> None:
        """Forget a request; its ``finish`` is not called any more. One that is on the device is left to end unheard."""

    async def predict(self, images: NDArray[np.uint8], deadline: float) -> Prediction:
        """Submit and await the answer; raise what ``submit`` raises, InferenceFailed, or DeadlineExceeded when it passes.

        When the awaiting task is cancelled, so is the request.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Prediction] = loop.create_future()
        request = self.submit(images, deadline, lambda outcome: settle(future, outcome))
        timer = loop.call_later(max(0.0, deadline - time.monotonic()), _expire, future)
        try:
            return await future
        except (asyncio.CancelledError, DeadlineExceeded):
            self.cancel(request)
            raise
        finally:
            timer.cancel()

    async def explain(self, image: NDArray[np.uint8], label: int | None, deadline: float) -> Explanation:
        """Explain class ``label``, or the likeliest if None, of uint8 (3, size, size); never touches queue or device.

        Raises NotReady, Overloaded, DeadlineExceeded, InferenceFailed, and NotFound for a model that cannot be explained.
        """
        raise NotFound("the answers of this model cannot be explained")


def check_images(images: NDArray[np.uint8], size: int, max_batch_size: int) -> None:
    """Raise ValueError unless ``images`` is what ``Engine.submit`` takes."""
    if images.dtype != np.uint8 or images.shape[1:] != (3, size, size) or not 0 < len(images) <= max_batch_size:
        raise ValueError(f"a request is uint8 (1..{max_batch_size}, 3, {size}, {size}), not {images.dtype} {images.shape}")


def settle(future: asyncio.Future[T], outcome: T | Exception) -> None:
    """Give ``future`` its result or its error, unless whoever awaited it was cancelled in the same turn of the loop."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _expire(future: asyncio.Future[Prediction]) -> None:
    settle(future, deadline_passed())
