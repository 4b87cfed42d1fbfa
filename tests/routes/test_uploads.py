"""Bodies as other people's clients send them."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess


@pytest.fixture(scope="module")
def client(checkpoint_path: Path) -> Iterator[httpx.Client]:
    """A client of a service of its own."""
    with ServiceProcess(checkpoint_path) as service, httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


@pytest.fixture
def image(image_paths: list[Path]) -> bytes:
    """One sample image."""
    return image_paths[0].read_bytes()


def encodings(image: bytes) -> dict[str, str]:
    """Base64 as encoders in use make it."""
    plain = base64.b64encode(image + b"\0").decode()  # a PNG may be followed by anything, and this one pads
    return {
        "line breaks": "\r\n".join(textwrap.wrap(plain, 76)) + "\r\n",
        "URL-safe": base64.urlsafe_b64encode(image).decode(),
        "unpadded": base64.b64encode(image).decode().rstrip("="),
        "data URI": "data:image/png;base64," + "\n".join(textwrap.wrap(plain, 64)),
    }


@pytest.mark.parametrize("name", ["line breaks", "URL-safe", "unpadded", "data URI"])
def test_base64_of_other_encoders_is_taken(client: httpx.Client, image: bytes, name: str) -> None:
    """Each is the same image."""
    expected = client.post("/predict", files={"file": image}).json()["predictions"]
    answer = client.post("/predict", json={"inputs": encodings(image)[name]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"] == expected


def test_json_may_begin_with_a_byte_order_mark(client: httpx.Client, image: bytes) -> None:
    """As .NET and PowerShell write it."""
    body = b'\xef\xbb\xbf{"inputs": "%s"}' % base64.b64encode(image)
    assert client.post("/predict", content=body, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded"])
def test_an_image_without_a_type_is_taken(client: httpx.Client, image: bytes, content_type: str | None) -> None:
    """``curl --data-binary`` and clients that send no Content-Type."""
    headers = {} if content_type is None else {"content-type": content_type}
    assert client.post("/predict", content=image, headers=headers).status_code == 200


def test_text_without_a_type_is_refused(client: httpx.Client) -> None:
    """What does not begin as an image gets the list of what is accepted."""
    answer = client.post("/predict", content=b"top_k=3", headers={"content-type": "application/x-www-form-urlencoded"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_options_may_be_fields_of_the_form(client: httpx.Client, image: bytes) -> None:
    """``top_k`` and ``threshold`` beside the file; a bad one is the error that it is in the query."""
    answer = client.post("/predict", files={"file": image}, data={"top_k": "2", "threshold": "0"}).json()
    assert (len(answer["predictions"]), answer["known"]) == (2, True)
    for field, code in (("top_k", "malformed_request"), ("threshold", "invalid_parameter")):
        assert client.post("/predict", files={"file": image}, data={field: "x"}).json()["code"] == code
