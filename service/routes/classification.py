"""Images to their prediction, and what answers say of that: classes by probability, times, batch.

Owns: the way of several images of a request through decoder and engine, one by one or as one, the order of classes, the
headers. Does not know: how the images came in, the JSON around the classes, and the way of a request's only image, which is
in ``one_image``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.types import Scope

from service.answers import best_classes
from service.engine.interface import Prediction
from service.errors import ServiceError
from service.observability.request_record import note_answered
from service.routes.context import ServiceContext

_T = TypeVar("_T")


@dataclass(slots=True)
class Classification:
    """The prediction of one image (or of several, in rows) and how long decoding took, in seconds."""

    prediction: Prediction
    decode_s: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Give ``Server-Timing`` in milliseconds and ``X-Batch-Size``."""
        prediction = self.prediction
        timing = b"decode;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f" % (
            self.decode_s * 1e3,
            prediction.queue_s * 1e3,
            prediction.compute_s * 1e3,
        )
        return [(b"server-timing", timing), (b"x-batch-size", b"%d" % prediction.batch_size)]

    def best_classes(self, top_k: int, row: int = 0) -> list[dict[str, Any]]:
        """See ``service.answers.best_classes``."""
        return best_classes(self.prediction.probabilities[row], self.prediction.model.class_names, top_k)


async def classify_one_of(
    context: ServiceContext, scope: Scope, data: bytes, deadline: float, gate: asyncio.Semaphore
) -> Classification:
    """Decode and predict one of several images of a request before ``deadline``; raise what decoder and engine raise.

    A full queue refuses before the image is decoded. The images of a request wait for their ``gate``, see ``Decoder.gate``.
    """
    await context.turns.wait()
    context.check_room()
    async with gate:
        began = time.monotonic()
        image = await context.decoder.decode(data, context.model().input, deadline)
    submitted = time.monotonic()
    prediction = await context.engine.predict(image[None], deadline)
    note_answered(scope, prediction, submitted, began)
    return Classification(prediction, submitted - began)


async def classify_images(
    context: ServiceContext, scope: Scope, images: Sequence[bytes | memoryview] | NDArray[np.uint8], deadline: float
) -> Classification:
    """Predict encoded images, or uint8 (N, 3, size, size), before ``deadline`` (``time.monotonic()``, seconds).

    Raises what the decoder raises for the first bad image, saying which one it is, and what the engine raises.
    """
    await context.turns.wait()
    context.check_room()
    began = time.monotonic()
    pixels = images if isinstance(images, np.ndarray) else await _decode_all(context, images, deadline)
    submitted = time.monotonic()
    prediction = await _predict(context, pixels, deadline)
    note_answered(scope, prediction, submitted, None if pixels is images else began)
    return Classification(prediction, submitted - began)


async def _predict(context: ServiceContext, pixels: NDArray[np.uint8], deadline: float) -> Prediction:
    """Predict uint8 (N, 3, size, size) in calls of at most ``max_batch_size`` images, all by one model."""
    step = context.settings.max_batch_size
    if len(pixels) <= step:
        return await context.engine.predict(pixels, deadline)
    while True:
        parts = [pixels[start : start + step] for start in range(0, len(pixels), step)]
        predictions = await _all_or_none(context.engine.predict(part, deadline) for part in parts)
        # A model that was replaced between two parts would make an answer of two models: the new one answers all.
        if all(prediction.model == predictions[0].model for prediction in predictions):
            return _join(predictions)


async def _decode_all(context: ServiceContext, images: Sequence[bytes | memoryview], deadline: float) -> NDArray[np.uint8]:
    """Decode to uint8 (N, 3, size, size)."""
    spec = context.model().input
    if len(images) == 1:
        return (await context.decoder.decode(images[0], spec, deadline))[None]
    pixels = np.empty((len(images), 3, spec.size, spec.size), np.uint8)
    gate = context.decoder.gate()

    async def decode(index: int, data: bytes | memoryview) -> None:
        async with gate:
            try:
                pixels[index] = await context.decoder.decode(data, spec, deadline)
            except ServiceError as error:
                raise type(error)(f"image {index}: {error.detail}", retry_after_s=error.retry_after_s) from error
            await asyncio.sleep(0)  # a small image is decoded without waiting; others want their turn too

    await _all_or_none(decode(index, data) for index, data in enumerate(images))
    return pixels


async def _all_or_none(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all; when one fails, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _join(predictions: Sequence[Prediction]) -> Prediction:
    """Make one prediction of several by one model; its times and its batch are the longest and the largest."""
    return Prediction(
        np.concatenate([prediction.probabilities for prediction in predictions]),
        predictions[0].model,
        max(prediction.queue_s for prediction in predictions),
        max(prediction.compute_s for prediction in predictions),
        max(prediction.batch_size for prediction in predictions),
    )
