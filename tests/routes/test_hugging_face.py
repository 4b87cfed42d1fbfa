"""``POST /hf`` with the stock ``huggingface_hub.InferenceClient``, unmodified, against the running service."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from benchmarks.servers.service_process import ServiceProcess
from service.errors import Overloaded
from tests.support.scripted_engine import ApplicationServer


@pytest.fixture
def client(service: ServiceProcess) -> InferenceClient:
    """The stock client, with the service in the place of a model."""
    return InferenceClient(f"{service.url}/hf")


@pytest.fixture(scope="module")
def application() -> Iterator[ApplicationServer]:
    """The application over a scripted engine of three classes, with small limits."""
    with ApplicationServer(max_body_bytes=20_000, max_image_pixels=2_000) as running:
        yield running


@pytest.fixture
def path(image_paths: list[Path]) -> Path:
    """One of the sample images."""
    return image_paths[0]


@pytest.fixture
def expected(service: ServiceProcess, path: Path) -> list[dict[str, Any]]:
    """What ``/predict`` answers for it, with all classes."""
    answer = httpx.post(f"{service.url}/predict?top_k=10", content=path.read_bytes(), headers={"Content-Type": "image/png"})
    predictions: list[dict[str, Any]] = answer.json()["predictions"]
    return predictions


def scores(elements: Any) -> list[tuple[str, float]]:
    """Labels and scores, as pairs."""
    return [(element["label"], element["score"]) for element in elements]


@pytest.mark.parametrize("form", ["path", "text", "bytes"])
@pytest.mark.parametrize("top_k", [None, 1, 3, 10])
def test_the_client_gets_what_predict_gives(
    client: InferenceClient, path: Path, expected: list[dict[str, Any]], form: str, top_k: int | None
) -> None:
    """Every form in which the client takes an image gets the same classes, five of them or as many as asked for."""
    image = path if form == "path" else str(path) if form == "text" else path.read_bytes()
    elements = client.image_classification(image, top_k=top_k)
    assert scores(elements) == scores(expected[: top_k or 5])


def test_the_model_may_be_given_with_the_call(service: ServiceProcess, path: Path, expected: list[dict[str, Any]]) -> None:
    """``model`` is the address of the service."""
    elements = InferenceClient().image_classification(path, model=f"{service.url}/hf", function_to_apply="softmax")
    assert scores(elements) == scores(expected[:5])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own call of its HTTP library
def test_the_asyncio_client_works_as_well(service: ServiceProcess, path: Path, expected: list[dict[str, Any]]) -> None:
    """``AsyncInferenceClient``, several requests at once."""

    async def classify() -> list[Any]:
        async with AsyncInferenceClient(f"{service.url}/hf") as client:
            return await asyncio.gather(*(client.image_classification(path.read_bytes(), top_k=2) for _ in range(4)))

    for elements in asyncio.run(classify()):
        assert scores(elements) == scores(expected[:2])


@pytest.mark.parametrize("function", ["sigmoid", "none"])
def test_other_functions_are_refused(client: InferenceClient, path: Path, function: Any) -> None:
    """Scores are calibrated probabilities; the client shows the sentence that says so."""
    with pytest.raises(HfHubHTTPError, match="can only be softmax") as refusal:
        client.image_classification(path, function_to_apply=function)
    assert refusal.value.response.status_code == 422


@pytest.mark.parametrize("top_k", [0, -1, 11])
def test_more_or_fewer_classes_than_there_are_cannot_be_had(client: InferenceClient, path: Path, top_k: int) -> None:
    """``top_k`` is 1 to the number of classes."""
    with pytest.raises(HfHubHTTPError, match="between 1 and 10") as refusal:
        client.image_classification(path, top_k=top_k)
    assert refusal.value.response.status_code == 422


def test_what_is_no_image_is_refused_in_words(client: InferenceClient) -> None:
    """The client shows the service's own sentence."""
    with pytest.raises(HfHubHTTPError, match="not an image of a known format") as refusal:
        client.image_classification(b"no image")
    assert refusal.value.response.status_code == 422


@pytest.mark.parametrize("content_type", [None, "image/png", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_the_body_is_the_image_whatever_it_is_called(
    service: ServiceProcess, path: Path, expected: list[dict[str, Any]], content_type: str | None
) -> None:
    """The clients send bytes without a type, and curl calls every body a form."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = httpx.post(f"{service.url}/hf", content=path.read_bytes(), headers=headers)
    assert response.status_code == 200
    assert scores(response.json()) == scores(expected[:5])
    assert response.headers["x-batch-size"] == "1"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/octet-stream"}], ids=["no type", "bytes"])
def test_json_needs_no_type(
    service: ServiceProcess, path: Path, expected: list[dict[str, Any]], headers: dict[str, str]
) -> None:
    """The clients of huggingface-hub 0.30 send none, and aiohttp calls it bytes."""
    body = json.dumps({"inputs": base64.b64encode(path.read_bytes()).decode(), "parameters": {"top_k": 2}})
    response = httpx.post(f"{service.url}/hf", content=body.encode(), headers=headers)
    assert scores(response.json()) == scores(expected[:2])


def test_a_data_uri_is_an_image(service: ServiceProcess, path: Path, expected: list[dict[str, Any]]) -> None:
    """As in ``/predict``."""
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    response = httpx.post(f"{service.url}/hf", json={"inputs": uri, "parameters": None})
    assert scores(response.json()) == scores(expected[:5])


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_request"),
        (b"[]", 400, "malformed_request"),
        (b"{}", 400, "malformed_request"),
        (b'{"inputs": 5}', 400, "malformed_request"),
        (b'{"inputs": "no base64!"}', 400, "malformed_request"),
        (b'{"inputs": "https://example.org/cat.png"}', 400, "malformed_request"),
        (b'{"inputs": "", "parameters": []}', 400, "malformed_request"),
        (b'{"inputs": "", "parameters": {"top_k": "3"}}', 400, "malformed_request"),
        (b'{"inputs": "", "parameters": {"top_k": true}}', 400, "malformed_request"),
        (b'{"inputs": "", "parameters": {"function_to_apply": 1}}', 400, "malformed_request"),
        (b'{"inputs": "", "parameters": {"temperature": 0.5}}', 422, "invalid_parameter"),
        (b'{"inputs": "", "parameters": {"top_k": 4}}', 422, "invalid_parameter"),
        (b'{"inputs": "", "parameters": {"top_k": 3}}', 422, "invalid_image"),
        (b'{"inputs": "' + b"A" * 20_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_requests_that_do_not_fit_are_refused(application: ApplicationServer, body: bytes, status: int, code: str) -> None:
    """A problem as everywhere else, with its detail under ``error`` too, which is what the clients show."""
    response = httpx.post(f"{application.url}/hf", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["error"] == problem["detail"]


def test_a_form_is_shown_the_way_to_predict(application: ApplicationServer, path: Path) -> None:
    """This dialect has no forms."""
    response = httpx.post(f"{application.url}/hf", files={"file": path.read_bytes()})
    assert response.status_code == 415
    assert "/predict" in response.json()["detail"]


def test_three_classes_are_all_there_are(application: ApplicationServer, path: Path) -> None:
    """The default number of classes is cut to what the model has."""
    response = httpx.post(f"{application.url}/hf", content=path.read_bytes())
    assert scores(response.json()) == [("cat", 0.7), ("dog", 0.2), ("horse", 0.1)]


def test_a_full_queue_says_when_to_come_back(path: Path) -> None:
    """429 with ``Retry-After``, in this dialect too."""
    with ApplicationServer() as application:
        application.engine.refuse = Overloaded("the queue is full; retry after the time given", retry_after_s=7)
        response = httpx.post(f"{application.url}/hf", content=path.read_bytes())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert json.loads(response.content)["error"] == "the queue is full; retry after the time given"


def test_other_methods_are_refused_in_the_dialect(application: ApplicationServer) -> None:
    """405 with the detail under ``error``."""
    response = httpx.get(f"{application.url}/hf")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]
