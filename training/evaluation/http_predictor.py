"""Predictions for a data set from a running service.

Owns: the requests, and that it is the right model that answers. Does not know: what is measured with the answers.
"""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import torch

from service.model.checkpoint import Checkpoint
from training.data.cifar10 import encode_png
from training.data.dataset import Dataset
from training.errors import EvaluationError
from training.evaluation.measurement import Predictions

_CONNECTIONS = 8
_TRIES = 10
_TIMEOUT_S = 60.0


class HttpPredictor:
    """A ``Predictor`` that sends one ``POST /predict`` an image, over a few connections that stay open.

    Images go as the files they came from, so the service decodes them; what has no file goes as PNG.
    """

    def __init__(self, url: str, checkpoint: Checkpoint, api_key: str = "") -> None:
        """Ask the service which model it serves; raise EvaluationError unless it is ``checkpoint``."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise EvaluationError(f"{url} is not an address of a service; give one like http://localhost:8000")
        self.name = parts.netloc
        self._is_https = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/octet-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._class_names = checkpoint.metadata.class_names
        with closing(self._connect()) as connection:
            served = self._ask(connection, "GET", "/labels", None)["model"]
        if served["version"] != checkpoint.version:
            raise EvaluationError(
                f"the service at {url} serves {served['name']} version {served['version']}, and the checkpoint is"
                f" {checkpoint.metadata.name} version {checkpoint.version}; give the checkpoint that is served"
            )

    def predict(self, data: Dataset, *, mirrored: bool = False) -> Predictions:
        """See ``training.evaluation.predictor.Predictor.predict``."""
        classes = len(self._class_names)
        probabilities = torch.zeros(len(data), classes)
        ranking = torch.zeros(len(data), classes, dtype=torch.int64)

        def ask_share(share: int) -> None:
            with closing(self._connect()) as connection:
                for index in range(share, len(data), _CONNECTIONS):
                    body = _encoded(data, index, mirrored=mirrored)
                    entries = self._ask(connection, "POST", f"/predict?top_k={classes}", body)["predictions"]
                    ranking[index] = torch.tensor([self._class_names.index(entry["label"]) for entry in entries])
                    probabilities[index, ranking[index]] = torch.tensor([entry["score"] for entry in entries])

        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            list(threads.map(ask_share, range(_CONNECTIONS)))
        return Predictions(probabilities, ranking)

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=_TIMEOUT_S)

    def _ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        """Give the JSON of the answer; ask again when the service is full or starting, or has closed the connection."""
        why = ""
        for _ in range(_TRIES):
            try:
                connection.request(method, self._prefix + path, body, self._headers)
                response = connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()  # the next request opens it again
                why = str(error) or type(error).__name__
                continue
            if response.status == 200:
                answer: dict[str, Any] = json.loads(text)
                return answer
            why = f"{response.status} {text[:200].decode(errors='replace')}"
            if response.status not in (429, 503):
                break
            time.sleep(float(response.headers.get("Retry-After", "1")))
        raise EvaluationError(f"the service at {self.name} does not answer {method} {path}: {why}")


def _encoded(data: Dataset, index: int, *, mirrored: bool) -> bytes:
    if data.paths and not mirrored:
        return data.paths[index].read_bytes()
    image = data.images[index]
    return encode_png((image.flip(-1) if mirrored else image).cpu().numpy())
