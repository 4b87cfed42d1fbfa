"""Predictions for a data set from a running service."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from service.client import Client, ClientError, RetryPolicy
from service.image_files import read_file
from service.model.checkpoint import Checkpoint
from service.model.images import encode_png
from training.data.dataset import Dataset
from training.errors import EvaluationError
from training.evaluation.measurement import Predictions

_CONNECTIONS = 8
_RETRY = RetryPolicy(max_tries=10)


class HttpPredictor:
    """A ``Predictor`` that sends one ``POST /predict`` per image, over several connections.

    Images are sent as the files they came from, so that the service decodes them; an image without a file is sent as PNG.
    """

    def __init__(self, url: str, checkpoint: Checkpoint, api_key: str = "") -> None:
        """Raise EvaluationError unless the service at ``url`` serves ``checkpoint``, ValueError when ``url`` is no address."""
        self.name = url.partition("//")[2].rstrip("/") or url
        self._class_names = checkpoint.metadata.class_names
        self._connect = partial(Client, url, api_key=api_key, timeout_s=60.0, retry=_RETRY)
        try:
            with self._connect() as client:
                served = client.labels().model
        except ClientError as error:
            raise EvaluationError(f"the service at {url} cannot be asked for its labels: {error}") from error
        if served.version != checkpoint.version:
            raise EvaluationError(
                f"the service at {url} serves {served.name} version {served.version}, and the checkpoint is"
                f" {checkpoint.metadata.name} version {checkpoint.version}; give the checkpoint that is served"
            )

    def predict(self, data: Dataset) -> Predictions:
        """See ``training.evaluation.predictor.Predictor.predict``."""
        classes = len(self._class_names)
        probabilities = torch.zeros(len(data), classes)
        ranking = torch.zeros(len(data), classes, dtype=torch.int64)
        typicality = torch.full((len(data),), torch.nan)

        def ask_share(client: Client, share: int) -> None:
            for index in range(share, len(data), _CONNECTIONS):
                answer = client.predict(_encoded(data, index), top_k=classes)
                scores = answer.predictions
                if answer.typicality is not None:
                    typicality[index] = answer.typicality
                ranking[index] = torch.tensor([self._class_names.index(entry.label) for entry in scores])
                probabilities[index, ranking[index]] = torch.tensor([entry.score for entry in scores])

        try:
            with self._connect() as client, ThreadPoolExecutor(_CONNECTIONS) as threads:
                list(threads.map(partial(ask_share, client), range(_CONNECTIONS)))
        except ClientError as error:
            raise EvaluationError(f"the service at {self.name} cannot classify an image: {error}") from error
        return Predictions(probabilities, ranking, None if typicality.isnan().any() else typicality)


def _encoded(data: Dataset, index: int) -> bytes:
    return read_file(data.paths[index]) if data.paths else encode_png(data.images[index].cpu().numpy())
