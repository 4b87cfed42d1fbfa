"""Predictions for a data set, from a checkpoint in this process.

``http_predictor`` asks a running service.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from service.model.classifier import Classifier
from service.runtime.runner import Runner
from training.data.dataset import Dataset
from training.evaluation.calibrate import images_at_once
from training.evaluation.measurement import Predictions


class Predictor(Protocol):
    """Something that answers for images; ``name`` says what it is in tables."""

    name: str

    def predict(self, data: Dataset) -> Predictions:
        """Predict every image of ``data``; raise EvaluationError when that fails."""
        ...


class RunnerPredictor:
    """Asks one of the service's runners, on all its streams at once."""

    def __init__(self, runner: Runner) -> None:
        self.name = runner.runtime
        self._runner = runner

    def predict(self, data: Dataset) -> Predictions:
        """See ``Predictor.predict``."""
        images = data.images.cpu().numpy()
        size = self._runner.buckets[-1]
        starts = range(0, len(images), size)
        batches: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(starts)

        def run(stream: int) -> None:
            for index in range(stream, len(starts), self._runner.streams):
                batches[index] = self._runner.run(images[starts[index] : starts[index] + size], stream)

        with ThreadPoolExecutor(self._runner.streams) as threads:
            list(threads.map(run, range(self._runner.streams)))
        return Predictions.of(torch.from_numpy(np.concatenate(batches)), len(data.class_names))


class ClassifierPredictor:
    """Asks the network in torch, on the device that holds it and the data."""

    name = "torch"

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    @torch.inference_mode()
    def predict(self, data: Dataset) -> Predictions:
        """See ``Predictor.predict``."""
        outputs = [self._classifier(batch) for batch in data.images.split(images_at_once(data.images))]
        return Predictions.of(torch.cat(outputs), len(data.class_names))


def average(first: Predictions, second: Predictions) -> Predictions:
    """Return the mean of two predictions for the same images, such as an image and its mirror image."""
    return Predictions.of((first.probabilities + second.probabilities) / 2)
