"""Asking a service that is not always at ease."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from service.model.checkpoint import Checkpoint, load_checkpoint
from training.data.dataset import Dataset
from training.errors import EvaluationError
from training.evaluation.http_predictor import HttpPredictor


@dataclass
class Script:
    """What a server says: these statuses first, one a request, then 200; and what it was asked."""

    version: str
    labels: list[str]
    statuses: list[int] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def model(self) -> dict[str, str]:
        """The model that the server says it has."""
        return {"name": "tiny", "version": self.version}

    def next_status(self, key: str | None) -> int:
        """Note a request's key; give the status of its answer."""
        with self._lock:
            self.keys.append(key)
            return self.statuses.pop(0) if self.statuses else 200


@pytest.fixture
def trained(finished_run: Path) -> Checkpoint:
    """The checkpoint of the tiny recipe."""
    return load_checkpoint(finished_run / "model.safetensors")


@pytest.fixture
def script(trained: Checkpoint) -> Iterator[Script]:
    """A server that follows a script; it closes every connection after an error, as servers may."""
    script = Script(trained.version, list(trained.metadata.class_names))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.answer({"labels": script.labels, "model": script.model})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            scores = [{"label": label, "score": score} for label, score in zip(script.labels, (0.5, 0.3, 0.2), strict=True)]
            self.answer(scores[0] | {"predictions": scores, "filename": None, "model": script.model})

        def answer(self, content: object) -> None:
            status = script.next_status(self.headers["Authorization"])
            body = json.dumps(
                content
                if status == 200
                else {
                    "type": "about:blank",
                    "title": "t",
                    "status": status,
                    "code": "some_problem",
                    "detail": "d",
                    "request_id": "r",
                }
            ).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            if status != 200:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        script.url = f"http://127.0.0.1:{server.server_port}"
        yield script
        server.shutdown()
        thread.join()


@pytest.fixture
def data(trained: Checkpoint) -> Dataset:
    """Twenty black images."""
    labels = torch.zeros(20, dtype=torch.int64)
    return Dataset(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), labels, trained.metadata.class_names)


def test_a_full_or_starting_service_is_asked_again(script: Script, trained: Checkpoint, data: Dataset) -> None:
    """429 and 503 mean later, not never: every image gets its answer."""
    script.statuses = [503, 200, 429, 503, 429, 429]
    predictions = HttpPredictor(script.url, trained).predict(data)
    assert predictions.labels.tolist() == [0] * 20
    torch.testing.assert_close(predictions.probabilities, torch.tensor([[0.5, 0.3, 0.2]]).expand(20, 3))
    assert len(script.keys) == 1 + 20 + 5


def test_a_service_that_stays_full_is_given_up(script: Script, trained: Checkpoint) -> None:
    """After ten tries the error says what the service said last."""
    script.statuses = [503] * 100
    with pytest.raises(EvaluationError, match=r"cannot be asked for its labels: 503 some_problem"):
        HttpPredictor(script.url, trained)
    assert len(script.keys) == 10


def test_a_refusal_is_told_at_once(script: Script, trained: Checkpoint, data: Dataset) -> None:
    """What asking again would not change, such as a missing key, ends the evaluation with the service's word."""
    predictor = HttpPredictor(script.url, trained)
    script.statuses = [401] * 100
    with pytest.raises(EvaluationError, match=r"cannot classify an image: 401"):
        predictor.predict(data)
    assert len(script.keys) <= 1 + 8, "no connection asks twice"


def test_the_key_goes_with_every_request(script: Script, trained: Checkpoint, data: Dataset) -> None:
    """A service with API keys is asked with one."""
    HttpPredictor(script.url, trained, api_key="secret").predict(data)
    assert set(script.keys) == {"Bearer secret"}


def test_an_address_without_scheme_is_http(script: Script, trained: Checkpoint) -> None:
    """``localhost:8000`` is what people type."""
    assert HttpPredictor(script.url.removeprefix("http://"), trained).name == script.url.removeprefix("http://")
