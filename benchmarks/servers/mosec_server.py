"""mosec over this project's runner: one worker per core, each decodes, batches and infers; the image is the raw body.

The checkpoint, the runtime and the address come as MOSEC's own flags and RIVAL_* environment variables.
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


class Classifier(Worker):
    """One model per process, on one thread."""

    def __init__(self) -> None:
        checkpoint = load_checkpoint(Path(os.environ["RIVAL_CHECKPOINT"]))
        options = RunnerOptions(
            runtime=os.environ["RIVAL_RUNTIME"], threads=int(os.environ["RIVAL_THREADS"]), max_batch_size=_MAX_BATCH_SIZE
        )
        self._spec, self._names = checkpoint.metadata.input, checkpoint.metadata.class_names
        self._runner = open_runner(checkpoint, options)

    def deserialize(self, data: bytes) -> object:
        """Decode the body."""
        try:
            return decode_image(data, self._spec)
        except ServiceError as error:
            raise ValidationError(error.detail) from error

    def forward(self, data: list[object]) -> list[dict[str, object]]:
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
    server.append_worker(
        Classifier, num=int(os.environ["RIVAL_WORKERS"]), max_batch_size=_MAX_BATCH_SIZE, max_wait_time=1, timeout=10_000
    )
    server.run()  # type: ignore[no-untyped-call]  # nor this
