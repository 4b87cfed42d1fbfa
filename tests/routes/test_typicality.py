"""Typicality over HTTP, with the model in the repository."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import InferenceClient

from benchmarks.servers.service_process import ServiceProcess
from tests.support.image_file import noise

PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def client(checkpoint_path: Path) -> Iterator[httpx.Client]:
    """A client of a service of its own."""
    with ServiceProcess(checkpoint_path) as service, httpx.Client(base_url=service.url, timeout=30, headers=PNG) as client:
        yield client


def test_a_test_image_is_known(client: httpx.Client, image_paths: list[Path]) -> None:
    """Most sample images are like the training images, and each answer says how much."""
    answers = [client.post("/predict", content=path.read_bytes()).json() for path in image_paths]
    assert all(0 <= answer["typicality"] <= 1 for answer in answers)
    assert sum(answer["known"] for answer in answers) >= 0.8 * len(answers)


def test_noise_is_not_known(client: httpx.Client) -> None:
    """It keeps its label unless the client rejects what is not known; the predictions stay."""
    flagged = client.post("/predict", content=noise()).json()
    assert (flagged["known"], flagged["typicality"] < 0.01) == (False, True)
    assert flagged["label"] == flagged["predictions"][0]["label"]
    rejected = client.post("/predict?unknown=reject", content=noise()).json()
    assert (rejected["label"], rejected["score"]) == (None, None)
    assert rejected["predictions"] == flagged["predictions"]


def test_the_request_may_choose_the_threshold(client: httpx.Client, image_paths: list[Path]) -> None:
    """At 0 everything is known; at 1 hardly anything is."""
    assert client.post("/predict?threshold=0", content=noise()).json()["known"] is True
    answer = client.post("/predict?threshold=1", content=image_paths[0].read_bytes()).json()
    assert answer["known"] is (answer["typicality"] >= 1)


def test_a_batch_says_it_of_each_image(client: httpx.Client, image_paths: list[Path]) -> None:
    """Entries of ``/predict/batch`` have the fields of an answer."""
    files = [("file", ("a.png", image_paths[0].read_bytes())), ("file", ("b.png", noise()))]
    first, second = httpx.post(client.base_url.join("/predict/batch"), files=files, timeout=30).json()["results"]
    assert (first["known"], second["known"]) == (True, False)


def test_options_come_from_the_query_and_the_body_together(client: httpx.Client) -> None:
    """What JSON or a form does not name is taken from the query, in every dialect that has both."""
    json = {"inputs": base64.b64encode(noise()).decode(), "parameters": {"top_k": 2}}
    for answer in (
        client.post("/predict?unknown=reject", json=json, headers={"content-type": "application/json"}).json(),
        httpx.post(
            client.base_url.join("/predict?unknown=reject"), files={"file": noise()}, data={"top_k": "2"}, timeout=30
        ).json(),
    ):
        assert (answer["label"], len(answer["predictions"])) == (None, 2)
    answer = client.post("/hf?threshold=0", json=json, headers={"content-type": "application/json"})
    assert len(answer.json()) == 2


def test_hugging_faces_clients_may_reject_what_is_not_known(client: httpx.Client, image_paths: list[Path]) -> None:
    """The list is empty then; the dialect has no place for a number that is not of a class."""
    stock = InferenceClient(f"{client.base_url}/hf?unknown=reject")
    assert stock.image_classification(noise()) == []
    assert len(stock.image_classification(image_paths[0])) == 5
    assert len(InferenceClient(f"{client.base_url}/hf").image_classification(noise())) == 5


@pytest.mark.parametrize("query", ["threshold=2", "threshold=-0.1", "threshold=much", "threshold=nan", "unknown=maybe"])
def test_other_values_are_refused(client: httpx.Client, query: str) -> None:
    """Each is a 422 that says what is allowed."""
    answer = client.post(f"/predict?{query}", content=noise())
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
