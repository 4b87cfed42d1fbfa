"""One encoded image to its prediction, and what answers say of that: classes by probability, times, batch.

Owns: the way from bytes through decoder and engine, the order of classes, the headers. Does not know: how the image came
in, the JSON around the classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from service.context import ServiceContext
from service.engine import Prediction


@dataclass(frozen=True, slots=True)
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
        """Give label and score of the ``top_k`` likeliest, descending; equal ones keep the order of the classes."""
        scores = self.prediction.probabilities[row].tolist()
        class_names = self.prediction.model.class_names
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
        return [{"label": class_names[index], "score": round(scores[index], 6)} for index in order]


async def classify(context: ServiceContext, data: bytes, deadline: float) -> Classification:
    """Decode and predict one image before ``deadline``; raise what the decoder and the engine raise."""
    began = time.monotonic()
    image = await context.decoder.decode(data, context.model().input, deadline)
    decode_s = time.monotonic() - began
    return Classification(await context.engine.predict(image[None], deadline), decode_s)
