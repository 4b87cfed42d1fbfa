"""The model in this process: images to the answers that a service with the same settings would give."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from service.answers import OptionArguments, check_top_k, make_options
from service.engine.interface import ModelInfo, Prediction
from service.errors import ServiceError
from service.image_files import Image, read_image
from service.model.checkpoint import load_checkpoint
from service.model.images import decode_image
from service.model.typicality import split_output
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from service.schemas import Answer, EntryError, FailedEntry
from service.settings import Settings, load_settings


class Classifier(AbstractContextManager["Classifier"]):
    """Classifies images in this process; one thread at a time may use it.

    >>> from service import Classifier
    >>> with Classifier() as classifier:
    ...     print(classifier.predict("tom.jpg").label)
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str] | None = None, *, batch_size: int = 8, settings: Settings | None = None
    ) -> None:
        """Load the model, by default that of ``settings``, which are by default those of the environment (``SERVICE_...``).

        The device gets at most ``batch_size`` images at a time. Raises SettingsError, CheckpointError or RunnerError.
        """
        settings = settings or load_settings()
        loaded = load_checkpoint(settings.checkpoint if checkpoint is None else Path(checkpoint))
        self._batch_size = size = max(1, min(batch_size, settings.max_batch_size))
        self._runner = open_runner(loaded, replace(RunnerOptions.of(settings), streams=1, max_batch_size=size))
        self._max_image_pixels = settings.max_image_pixels
        self._model = ModelInfo.of(loaded, settings.unknown_threshold)
        self.class_names = self._model.class_names

    def predict(self, image: Image, **options: Unpack[OptionArguments]) -> Answer:
        """Classify one image; see ``OptionArguments``.

        Raises OSError for a file that cannot be read, and ServiceError for an image or an option that a service would refuse.
        """
        (answer,) = self._predict([image], options)
        if isinstance(answer, ServiceError):
            raise answer
        return answer

    def predict_batch(self, images: Sequence[Image], **options: Unpack[OptionArguments]) -> list[Answer | FailedEntry]:
        """Classify several images; return one entry for each, in order. Raises as ``predict`` does.

        An image that cannot be decoded has a FailedEntry and fails no other.
        """
        return [
            FailedEntry(filename=None, error=EntryError(status=entry.status, code=entry.code, detail=entry.detail))
            if isinstance(entry, ServiceError)
            else entry
            for start in range(0, len(images), self._batch_size)
            for entry in self._predict(images[start : start + self._batch_size], options)
        ]

    def close(self) -> None:
        """Free the model's memory."""
        self._runner.close()

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _predict(self, images: Sequence[Image], arguments: OptionArguments) -> list[Answer | ServiceError]:
        classes = len(self.class_names)
        options = make_options(**arguments)
        check_top_k(options.top_k, classes)
        decoded: list[tuple[NDArray[np.uint8] | ServiceError, str | None]] = []
        for data, name in map(read_image, images):
            try:
                decoded.append((decode_image(data, self._model.input, max_pixels=self._max_image_pixels), name))
            except ServiceError as error:
                decoded.append((error, name))
        pixels = [image for image, _ in decoded if not isinstance(image, ServiceError)]
        output = self._runner.run(np.stack(pixels)) if pixels else np.empty((0, classes), np.float32)
        probabilities, typicality = split_output(output, classes)
        prediction = Prediction(probabilities, self._model, 0.0, 0.0, len(pixels), typicality)
        row = count()
        return [
            image if isinstance(image, ServiceError) else Answer.model_validate(prediction.answer(next(row), options, name))
            for image, name in decoded
        ]
