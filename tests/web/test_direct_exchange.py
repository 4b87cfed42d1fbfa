"""Requests that are answered without ASGI: which they are, and that their connections behave as all others do.

What they are answered is in the tests of the errors and of the routes, which take both ways.
"""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from service.engine.interface import Outcome
from service.errors import ServiceError
from service.observability.request_record import RequestRecord
from tests.support.scripted_engine import ApplicationServer, probabilities

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def server() -> Iterator[ApplicationServer]:
    with ApplicationServer(direct=True) as server:
        yield server


@pytest.fixture(scope="module")
def png(image_paths: list[Path]) -> bytes:
    return image_paths[0].read_bytes()


def request_of(image: bytes, path: str = "/predict", *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: image/png", *headers, f"Content-Length: {len(image)}", "", "")
    return "\r\n".join(lines).encode() + image


class Answers:
    """Reads answers from a connection, one after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")

    def next(self) -> tuple[int, dict[str, str], dict[str, object]]:
        """Give status, headers and JSON of the next answer."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while (line := self._file.readline().strip()) != b"":
            name, _, value = line.partition(b": ")
            headers[name.decode()] = value.decode()
        return status, headers, json.loads(self._file.read(int(headers["content-length"])))

    def ended(self) -> bool:
        """Whether the server has closed the connection, without another byte."""
        return self._file.read(1) == b""


def test_which_requests_go_directly(server: ApplicationServer, png: bytes) -> None:
    """Plain posts of one image; what wants more of HTTP takes the other way, and is answered all the same."""
    with httpx.Client(base_url=server.url) as client:
        for path in ("/predict", "/predict?top_k=1", "/hf"):
            assert client.post(path, content=png).status_code in (200, 415)
        assert server.went_directly == ["/predict", "/predict", "/hf"]
        headers = {"Content-Type": "image/png"}
        for other in ({"Connection": "close"}, {"Expect": "100-continue"}):
            assert client.post("/predict", content=png, headers={**headers, **other}).status_code == 200
        assert client.post("/predict", content=iter([png[:10], png[10:]]), headers=headers).status_code == 200  # chunks
        assert client.post("/predict", content=png + bytes(70_000), headers=headers).status_code in (200, 422)
        assert client.post("/predict/batch", files=[("file", png)]).status_code == 200
        assert client.get("/predict").status_code == 405
        with socket.create_connection(server.address) as sock:
            sock.sendall(request_of(png).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            assert Answers(sock).next()[0] == 200
    assert len(server.went_directly) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("RATE_LIMIT", "9/second"), ("CORS_ORIGINS", "*"), ("ACCESS_LOG", "true"), ("OTLP_ENDPOINT", "http://127.0.0.1:1")],
)
def test_what_only_the_other_way_does_is_not_left_out(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """With a rate limit, CORS, an access log or traces, nothing goes directly."""
    monkeypatch.setenv(f"SERVICE_{name}", value)
    with ApplicationServer(direct=True) as server:
        assert httpx.post(f"{server.url}/predict", content=b"").status_code == 415
        assert server.went_directly == []


def test_requests_in_one_piece_are_answered_in_order(server: ApplicationServer, png: bytes) -> None:
    """A client may send the next requests before it has the answer; both ways share the connection."""
    ids = [f"id-{number}" for number in range(5)]
    sent = b"".join(request_of(png, "/predict", f"X-Request-ID: {id_}") for id_ in ids)
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(HEALTH + sent + HEALTH + request_of(b"no image", "/predict", "X-Request-ID: last"))
        answers = Answers(sock)
        seen = [answers.next() for _ in range(8)]
        sock.sendall(request_of(png, "/predict", "X-Request-ID: later"))
        seen.append(answers.next())
    assert [headers["x-request-id"] for _, headers, body in seen if "status" not in body or "code" in body] == [
        *ids,
        "last",
        "later",
    ]
    assert [status for status, _, _ in seen] == [200] * 7 + [422, 200]


@pytest.mark.parametrize("direct", [True, False])
def test_an_answered_request_waits_for_no_garbage_collector(direct: bool, png: bytes) -> None:
    """Its record and its error are gone with it, either way: a process full of requests has no cycles of them to look for."""
    with ApplicationServer(direct=direct) as server, httpx.Client(base_url=server.url) as client:
        gc.collect()
        errors_before = _count(ServiceError)  # other tests' own
        gc.disable()
        try:
            for _ in range(10):
                assert client.post("/predict", content=png, headers={"Content-Type": "image/png"}).status_code == 200
                assert client.post("/predict", content=b"no image", headers={"Content-Type": "image/png"}).status_code == 422
            left, errors_left = _count(RequestRecord), _count(ServiceError) - errors_before
        finally:
            gc.enable()
    assert left <= 1  # the last one's, which may be on its way out
    assert errors_left <= 1


def _count(kind: type) -> int:
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


def test_a_body_in_pieces(server: ApplicationServer, png: bytes) -> None:
    """However it is cut, it is the same image."""
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = Answers(sock)
        for step in (1, 700):
            whole = request_of(png)
            for start in range(0, len(whole), step):
                sock.sendall(whole[start : start + step])
            assert answers.next()[0] == 200
    assert len(server.went_directly) == 2
    first, second = server.engine.submitted
    assert (first.images == second.images).all()


def test_an_answer_while_draining_ends_the_connection(server: ApplicationServer, png: bytes) -> None:
    """The client is told to take its next request elsewhere."""
    with socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        sock.sendall(request_of(png))
        assert "connection" not in answers.next()[1]
        server.draining = True
        sock.sendall(request_of(png))
        status, headers, _ = answers.next()
        assert (status, headers["connection"]) == (200, "close")
        assert answers.ended()


def test_an_idle_connection_is_closed_and_a_used_one_is_not(png: bytes) -> None:
    """The time counts from the last answer, however many came before it on the same timer."""
    with ApplicationServer(direct=True, keep_alive_s=1) as server, socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        waiting: list[Outcome | None] = [None]
        server.engine.answer = lambda images: waiting.pop() if waiting else probabilities(images)
        for _ in range(3):
            sock.sendall(HEALTH)
            assert answers.next()[0] == 200
        sock.sendall(request_of(png, "/predict", "X-Request-Timeout-Ms: 2500"))  # waits for longer than the time
        assert answers.next()[0] == 504
        assert answers.ended()


def test_large_images_are_decoded_in_the_pool(server: ApplicationServer, png: bytes) -> None:
    """Few bytes may be many pixels; sound, damaged and abandoned, each ends as it should, and harms no neighbour."""
    file = BytesIO()
    Image.new("RGB", (3000, 2000), (200, 30, 30)).save(file, "PNG")
    large = file.getvalue()
    with socket.create_connection(server.address, timeout=60) as leaving:
        leaving.sendall(request_of(large))
        while not server.went_directly:
            httpx.get(f"{server.url}/health")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        headers = {"Content-Type": "image/png"}
        assert client.post("/predict", content=large, headers=headers).status_code == 200
        assert client.post("/predict", content=large[:-2000], headers=headers).json()["code"] == "invalid_image"
        late = client.post("/predict", content=large, headers={**headers, "X-Request-Timeout-Ms": "1"})
        assert late.json()["code"] == "deadline_exceeded"
        assert client.post("/predict", content=png, headers=headers).status_code == 200
        metrics = client.get("/metrics").text
    assert len(server.went_directly) == 5
    assert "service_requests_in_flight 0.0" in metrics
    assert 'service_requests_total{route="/predict",status="200"} 2.0' in metrics


def test_an_answer_that_cannot_be_sent_ends_its_own_connection(server: ApplicationServer, png: bytes) -> None:
    """Whoever hands out the engine's answers goes on with the next."""

    class Impossible(ServiceError):
        status = 799

    answers: list[Outcome] = [Impossible("no such status")]
    server.engine.answer = lambda images: answers.pop() if answers else probabilities(images)
    with httpx.Client(base_url=server.url) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/predict", content=png, headers={"Content-Type": "image/png"})
        assert client.post("/predict", content=png, headers={"Content-Type": "image/png"}).status_code == 200


def test_a_client_that_leaves_at_any_moment_leaves_nothing(server: ApplicationServer, png: bytes) -> None:
    """In the middle of its body, while it waits, or with half of another request behind: it is cancelled, and counted."""
    server.engine.answer = lambda images: None
    whole = request_of(png)
    for sent in (whole[:-10], whole, whole + whole[:50]):
        before = len(server.went_directly)
        with socket.create_connection(server.address, timeout=60) as sock:
            sock.sendall(sent)
            while len(server.went_directly) == before:
                httpx.get(f"{server.url}/health")
    while "service_cancellations_total 3.0" not in (text := httpx.get(f"{server.url}/metrics").text):
        pass
    assert "service_requests_in_flight 0.0" in text
    assert len(server.engine.submitted) == 2
    assert server.engine.cancelled == server.engine.submitted
