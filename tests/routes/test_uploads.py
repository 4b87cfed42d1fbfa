"""Bodies as other people's clients send them."""

from __future__ import annotations

import base64
import gzip
import textwrap
import threading
import zlib
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


def test_compressed_bodies_are_taken_in_every_form(client: httpx.Client, image: bytes) -> None:
    """Gzip and deflate, whatever the route and the Content-Type; another encoding is told what is accepted."""
    expected = client.post("/predict", content=image, headers={"content-type": "image/png"}).json()["predictions"]
    form = client.build_request("POST", "/predict", files={"file": image})
    json = client.build_request("POST", "/predict", json={"inputs": base64.b64encode(image).decode()})
    bodies = {"image/png": image, **{request.headers["content-type"]: request.read() for request in (form, json)}}
    for content_type, body in bodies.items():
        for encoding, data in (
            ("gzip", gzip.compress(body)),
            ("X-GZip", gzip.compress(body[:100]) + gzip.compress(b"") + gzip.compress(body[100:])),
            ("deflate", zlib.compress(body)),
            ("deflate", zlib.compress(body, wbits=-zlib.MAX_WBITS)),
        ):
            headers = {"content-type": content_type, "content-encoding": encoding}
            answer = client.post("/predict", content=data, headers=headers)
            assert answer.json()["predictions"] == expected
    answer = client.post("/hf", content=gzip.compress(image), headers={"content-encoding": "gzip"})
    assert answer.json() == expected
    answer = client.post("/hf", content=image, headers={"content-encoding": "br"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert answer.headers["accept-encoding"] == "gzip, deflate"


TENSOR = b'{"inputs": [{"name": "image", "shape": [%s], "datatype": "BYTES", "data": ["aGk="]}], "outputs": [%s]}'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", b'{"inputs": [' + b"[]," * 5_000 + b"[]]}"),
        ("/predict", b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("/hf", b'{"inputs": {' + b'"a":1,' * 20_000 + b'"a":1}}'),
        ("/v2/models/resnet18-cifar10/infer", TENSOR % (b'"a",' * 1_600_000 + b"1", b"")),
        ("/v2/models/resnet18-cifar10/infer", TENSOR % (b"1", b"1," * 1_600_000 + b"1")),
        ("/v2/models/resnet18-cifar10/infer", TENSOR % (b"1", b"[]," * 200_000 + b"[]")),
    ],
    ids=["lists", "depth", "members", "shape", "outputs", "lists in a tensor"],
)
def test_json_of_many_values_is_refused(client: httpx.Client, path: str, body: bytes) -> None:
    """By their number, and before each of them is looked at."""
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "many values" in answer.text or "at most" in answer.text or "valid JSON" in answer.text


def test_large_forms_and_json_are_read(client: httpx.Client, image: bytes) -> None:
    """Off the event loop they are what they are on it: an image with 500 kB behind it, in each form."""
    large = image + bytes(500_000)
    expected = client.post("/predict", files={"file": image}).json()["predictions"]
    assert client.post("/predict", files={"file": large}).json()["predictions"] == expected
    assert client.post("/predict", json={"inputs": base64.b64encode(large).decode()}).json()["predictions"] == expected
    assert client.post("/predict/batch", files={"file": large}).json()["results"][0]["predictions"] == expected
    assert client.post("/view", files={"file": large}).headers["content-type"] == "image/png"
    assert client.post("/predict", files={"image": large}).json()["code"] == "missing_file"


@pytest.mark.slow
def test_health_answers_while_hostile_bodies_arrive(checkpoint_path: Path) -> None:
    """16 MiB of what is dear to read, from several clients at once: health is answered more often than they are."""
    size = 16 * 2**20 - 1000
    boundary = b"b" * 70
    form = b"multipart/form-data; boundary=" + boundary
    json = b"application/json"
    hostile = [
        (form, b"\r\n--" + boundary[1:] + b"c"),
        (form, b"\r\n--b"),
        (form, b"--" + boundary + b"\r\n" + b"\r\n--"),
        (json, b"[],"),
        (json, b"["),
        (json, b'"a",'),
        (json, b"A "),
    ]
    done = threading.Event()
    probes = 0
    with ServiceProcess(checkpoint_path, workers=1) as service:

        def watch() -> None:
            nonlocal probes
            with httpx.Client(base_url=service.url, timeout=60) as client:
                while not done.is_set():
                    probes += client.get("/health/live").status_code == 200

        def attack(content_type: bytes, unit: bytes) -> None:
            opening = b'{"inputs": "' if unit == b"A " else b"["
            body = (opening if content_type == json else b"") + unit * (size // len(unit))
            headers = {b"content-type": content_type}
            answers.append(httpx.post(f"{service.url}/predict", content=body, headers=headers, timeout=60).status_code)

        answers: list[int] = []
        watcher = threading.Thread(target=watch)
        watcher.start()
        attackers = [threading.Thread(target=attack, args=each) for each in hostile * 3]
        for thread in attackers:
            thread.start()
        for thread in attackers:
            thread.join()
        done.set()
        watcher.join()
    assert answers == [400] * len(attackers)
    assert probes > len(attackers)


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
        "spaces": f" data:image/png; base64, {plain}",
        "data URI": "data:image/png;base64," + "\n".join(textwrap.wrap(plain, 64)),
    }


@pytest.mark.parametrize("name", ["line breaks", "URL-safe", "unpadded", "spaces", "data URI"])
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
