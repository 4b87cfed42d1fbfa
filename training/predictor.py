"""Predictions for a data set, from a checkpoint in this process or from a running service.

Owns: the two ways, and that they give the same form. Does not know: what is measured with them.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray

from service.checkpoint import Checkpoint
from service.runner import Runner
from training.cifar10 import encode_png
from training.data import Dataset
from training.errors import EvaluationError
from training.measurement import Predictions


class Predictor(Protocol):
    """Something that answers for images; ``name`` says what it is in tables."""

    name: str

    def predict(self, data: Dataset, *, mirrored: bool = False) -> Predictions:
        """Predict every image of ``data``, or its horizontal mirror image; raise EvaluationError when that fails."""
        ...


class RunnerPredictor:
    """Asks one of the service's runners, on all its streams at once."""

    def __init__(self, runner: Runner) -> None:
        self.name = runner.runtime
        self._runner = runner

    def predict(self, data: Dataset, *, mirrored: bool = False) -> Predictions:
        """See ``Predictor.predict``."""
        images = (data.images.flip(-1) if mirrored else data.images).cpu().numpy()
        size = self._runner.buckets[-1]
        starts = range(0, len(images), size)
        batches: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(starts)

        def run(stream: int) -> None:
            for index in range(stream, len(starts), self._runner.streams):
                batches[index] = self._runner.run(images[starts[index] : starts[index] + size], stream)

        with ThreadPoolExecutor(self._runner.streams) as threads:
            list(threads.map(run, range(self._runner.streams)))
        return Predictions.of(torch.from_numpy(np.concatenate(batches)))


class HttpPredictor:
    """Asks a running service, one ``POST /predict`` an image, over a few connections that stay open.

    Images go as the files they came from, so the service decodes them; what has no file goes as PNG.
    """

    _CONNECTIONS = 8
    _TRIES = 10

    def __init__(self, url: str, checkpoint: Checkpoint, api_key: str = "") -> None:
        """Ask the service which model it serves; raise EvaluationError unless it is ``checkpoint``."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise EvaluationError(f"{url} is not an address of a service; give one like http://localhost:8000")
        self.name = parts.netloc
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = (parts.hostname, parts.port)
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._class_names = checkpoint.metadata.class_names
        self._local = threading.local()
        served = self._ask("GET", "/labels", None)["model"]
        if served["version"] != checkpoint.version:
            raise EvaluationError(
                f"the service at {url} serves {served['name']} version {served['version']}, and the checkpoint is"
                f" {checkpoint.metadata.name} version {checkpoint.version}; give the checkpoint that is served"
            )

    def predict(self, data: Dataset, *, mirrored: bool = False) -> Predictions:
        """See ``Predictor.predict``."""
        classes = len(self._class_names)
        probabilities = torch.zeros(len(data), classes)
        ranking = torch.zeros(len(data), classes, dtype=torch.int64)

        def ask(index: int) -> None:
            if data.paths and not mirrored:
                body = data.paths[index].read_bytes()
            else:
                image = data.images[index].flip(-1) if mirrored else data.images[index]
                body = encode_png(image.cpu().numpy())
            answer = self._ask("POST", f"/predict?top_k={classes}", body)
            labels = [self._class_names.index(entry["label"]) for entry in answer["predictions"]]
            ranking[index] = torch.tensor(labels)
            probabilities[index, ranking[index]] = torch.tensor([entry["score"] for entry in answer["predictions"]])

        with ThreadPoolExecutor(self._CONNECTIONS) as threads:
            _finish(threads.map(ask, range(len(data))))
        return Predictions(probabilities, ranking)

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        """Give the JSON of the answer; wait and ask again while the service is full, starting, or has closed a connection."""
        why = ""
        for _ in range(self._TRIES):
            connection: http.client.HTTPConnection = self._local.__dict__.setdefault(
                "connection", self._kind(*self._address, timeout=60)
            )
            try:
                connection.request(
                    method, self._prefix + path, body, {"Content-Type": "application/octet-stream"} | self._headers
                )
                response = connection.getresponse()
                status, text = response.status, response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                why = str(error) or type(error).__name__
                continue
            if status == 200:
                answer: dict[str, Any] = json.loads(text)
                return answer
            why = f"{status} {text[:200].decode(errors='replace')}"
            if status not in (429, 503):
                break
            time.sleep(float(response.headers.get("Retry-After", "1")))
        raise EvaluationError(f"the service at {self.name} does not answer {method} {path}: {why}")


def average(first: Predictions, second: Predictions) -> Predictions:
    """Give the mean of two predictions for the same images, such as an image and its mirror image."""
    return Predictions.of((first.probabilities + second.probabilities) / 2)


def _finish(results: Iterable[None]) -> None:
    """Wait for all; the first exception is raised here."""
    for _ in results:
        pass
