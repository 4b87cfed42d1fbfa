"""mosec over this project's runner; the image is the raw body.

A worker decodes, batches and infers, unless RIVAL_DECODERS processes of a first stage decode. The checkpoint, the workers and
their threads come as RIVAL_* environment variables, the address as mosec's own flags.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from mosec import Server, ValidationError, Worker

from service.errors import ServiceError
from service.model.checkpoint import load_checkpoint
from service.model.images import decode_image
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions

_MAX_BATCH_SIZE = 64


class Decoder(Worker):
    """Body to pixels."""

    def __init__(self) -> None:
        self._checkpoint = load_checkpoint(Path(os.environ["RIVAL_CHECKPOINT"]))
        self._spec, self._names = self._checkpoint.metadata.input, self._checkpoint.metadata.class_names

    def deserialize(self, data: bytes) -> object:
        """Decode the body; a worker of a second stage gets pixels instead."""
        try:
            return decode_image(data, self._spec)
        except ServiceError as error:
            raise ValidationError(error.detail) from error

    def forward(self, data: object) -> object:
        """Hand the pixels on."""
        return data


class Classifier(Decoder):
    """One model per process."""

    def __init__(self) -> None:
        super().__init__()
        threads = int(os.environ["RIVAL_THREADS"])
        self._runner = open_runner(self._checkpoint, RunnerOptions(threads=threads, streams=1, max_batch_size=_MAX_BATCH_SIZE))

    def forward(self, data: list[object]) -> list[dict[str, object]]:  # type: ignore[override]
        """Answer a batch."""
        rows = self._runner.run(np.stack(data))  # type: ignore[arg-type]  # what deserialize gave
        answers = []
        for row in rows.tolist():
            typicality = row[len(self._names) :]  # one number, or none
            del row[len(self._names) :]
            order = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:5]
            predictions = [{"label": self._names[index], "score": row[index]} for index in order]
            answers.append({**predictions[0], "predictions": predictions, "typicality": typicality})
        return answers


if __name__ == "__main__":
    server = Server()  # type: ignore[no-untyped-call]  # mosec types no constructor
    if decoders := int(os.environ["RIVAL_DECODERS"]):
        server.append_worker(Decoder, num=decoders, timeout=10_000)
    server.append_worker(
        Classifier, num=int(os.environ["RIVAL_WORKERS"]), max_batch_size=_MAX_BATCH_SIZE, max_wait_time=1, timeout=10_000
    )
    server.run()  # type: ignore[no-untyped-call]  # nor this
