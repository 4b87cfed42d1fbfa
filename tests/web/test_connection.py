"""A connection and its requests, over real sockets: order, pieces, ends."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO

import httpx
import pytest
from PIL import Image

from service.engine.interface import Outcome
from tests.support.patience import wait_until
from tests.support.scripted_engine import ApplicationServer, probabilities

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def server() -> Iterator[ApplicationServer]:
    with ApplicationServer() as server:
        yield server


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
    first, second = server.engine.submitted
    assert (first.images == second.images).all()


def test_an_answer_while_draining_ends_the_connection(server: ApplicationServer, png: bytes) -> None:
    """The client is told to take its next request elsewhere."""
    with socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        sock.sendall(request_of(png))
        assert "connection" not in answers.next()[1]
        server.supervisor.draining = True
        sock.sendall(request_of(png))
        status, headers, _ = answers.next()
        assert (status, headers["connection"]) == (200, "close")
        assert answers.ended()


def test_an_idle_connection_is_closed_and_a_used_one_is_not(png: bytes) -> None:
    """The time counts from the last answer, however many came before it on the same timer."""
    with ApplicationServer(keep_alive_s=0.3) as server, socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        waiting: list[Outcome | None] = [None]
        server.engine.answer = lambda images: waiting.pop() if waiting else probabilities(images)
        for _ in range(3):
            sock.sendall(HEALTH)
            assert answers.next()[0] == 200
        sock.sendall(request_of(png, "/predict", "X-Request-Timeout-Ms: 900"))  # waits for longer than the time
        assert answers.next()[0] == 504
        assert answers.ended()


def test_a_request_at_the_closing_moment_is_answered() -> None:
    """What was sent before the client saw the end is answered, the last of it with the news that the connection ends."""
    with ApplicationServer(keep_alive_s=0.2) as server, ExitStack() as stack:
        idle = []
        for number in range(50):
            sock = stack.enter_context(socket.create_connection(server.address, timeout=60))
            sock.sendall(HEALTH)
            assert Answers(sock).next()[0] == 200
            idle.append((time.monotonic() + 0.15 + number * 0.008, sock))
        seen = []
        for due, sock in sorted(idle, key=lambda each: each[0]):
            time.sleep(max(0.0, due - time.monotonic()))
            if not select.select([sock], [], [], 0)[0]:  # else this machine was too slow, and the client sees that it is closed
                sock.sendall(HEALTH)
                status, headers, _ = Answers(sock).next()
                seen.append((status, headers.get("connection")))
    assert {status for status, _ in seen} == {200}
    assert (200, "close") in seen


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        HEALTH.replace(b"Host: x\r\n", b"Host: x\r\nHost: x\r\n"),
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n",
    ],
    ids=["no host", "two hosts", "a long length"],
)
def test_headers_that_say_too_little_or_too_much(server: ApplicationServer, request_: bytes) -> None:
    """RFC 9112, section 3.2, and a length that no integer holds: 400, and the end of the connection."""
    with socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        sock.sendall(HEALTH + request_)
        assert answers.next()[0] == 200
        status, _, problem = answers.next()
        assert (status, problem["code"]) == (400, "malformed_request")
        assert answers.ended()


def test_http_1_0_needs_no_host(server: ApplicationServer) -> None:
    """As old load balancers ask for health."""
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert Answers(sock).next()[0] == 200


def test_large_images_are_decoded_in_the_pool(server: ApplicationServer, png: bytes) -> None:
    """Few bytes may be many pixels; sound, damaged and abandoned, each ends as it should, and harms no neighbour."""
    file = BytesIO()
    Image.new("RGB", (3000, 2000), (200, 30, 30)).save(file, "PNG")
    large = file.getvalue()
    with socket.create_connection(server.address, timeout=60) as leaving:
        leaving.sendall(request_of(large))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        headers = {"Content-Type": "image/png"}
        assert client.post("/predict", content=large, headers=headers).status_code == 200
        assert client.post("/predict", content=large[:-2000], headers=headers).json()["code"] == "invalid_image"
        late = client.post("/predict", content=large, headers={**headers, "X-Request-Timeout-Ms": "1"})
        assert late.json()["code"] == "deadline_exceeded"
        assert client.post("/predict", content=png, headers=headers).status_code == 200
        wait_until(lambda: "service_requests_in_flight 0.0" in client.get("/metrics").text)
        metrics = client.get("/metrics").text
    answered = re.search(r'service_requests_total\{route="/predict",status="200"\} (\d)', metrics)
    cancelled = re.search(r"service_cancellations_total (\d)", metrics)
    assert answered is not None
    assert cancelled is not None
    assert int(answered[1]) + int(cancelled[1]) == 3  # the client that left may have had its answer before


def test_a_client_that_leaves_at_any_moment_leaves_nothing(server: ApplicationServer, png: bytes) -> None:
    """In the middle of its body, while it waits, or with half of another request behind: it is cancelled, and counted."""
    server.engine.answer = lambda images: None
    whole = request_of(png)
    with ExitStack() as clients:
        for sent in (whole[:-10], whole, whole + whole[:50]):
            clients.enter_context(socket.create_connection(server.address, timeout=60)).sendall(sent)
        wait_until(lambda: in_flight(server) == 3)
    wait_until(lambda: in_flight(server) == 0)
    assert "service_cancellations_total 3.0" in httpx.get(f"{server.url}/metrics").text
    assert len(server.engine.submitted) == 2
    assert set(server.engine.cancelled) == set(server.engine.submitted)


def test_a_client_that_ends_its_own_side_gets_its_answers(server: ApplicationServer, png: bytes) -> None:
    """Those to all requests that are complete, with interim responses where it takes long."""
    server.engine.answer = lambda images: None
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(HEALTH * 2 + request_of(png, "/predict", "X-Request-Timeout-Ms: 700") + HEALTH[:10])
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            statuses = re.findall(rb"HTTP/1\.1 (\d+)", file.read())
    assert statuses == [b"200", b"200", b"100", b"504"]


def test_nothing_is_left_of_a_client_that_leaves_while_the_server_hangs_up(caplog: pytest.LogCaptureFixture) -> None:
    """After an early refusal, or in the moment in which an idle connection is closed: no connection, and nothing in the log."""
    refused = b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n"
    with ApplicationServer(keep_alive_s=0.01) as server:
        for request in (refused, HEALTH):
            with socket.create_connection(server.address, timeout=60) as sock:
                sock.sendall(request)
                Answers(sock).next()
                time.sleep(0.05 if request is HEALTH else 0.0)  # the server waits for a last request
        wait_until(lambda: not server.connections)
        time.sleep(0.55)  # the check after that wait is over
    assert "Exception in callback" not in caplog.text


def in_flight(server: ApplicationServer) -> int:
    """How many requests are being answered."""
    match = re.search(r"^service_requests_in_flight (\d+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert match is not None
    return int(match[1])


def test_an_upgrade_is_ignored(server: ApplicationServer, png: bytes) -> None:
    """A request that offers another protocol is answered as any other, its body included, whatever the pieces."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    whole = request_of(png, "/predict", *offer)
    head = whole.index(b"\r\n\r\n") + 4
    with socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        for pieces in ([whole], [whole[:head], whole[head:]], [whole + HEALTH]):
            for piece in pieces:
                sock.sendall(piece)
            assert answers.next()[0] == 200
        assert answers.next()[2]["status"] == "ready"
        sock.sendall(HEALTH.replace(b"Host", "\r\n".join((*offer, "Host")).encode()) * 600)
        for _ in range(600):
            assert answers.next()[0] == 200


def test_what_is_wrong_beside_an_upgrade_is_said(server: ApplicationServer, caplog: pytest.LogCaptureFixture) -> None:
    """The problem is that of the request, and a client's fault is no error in the log."""
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        status, _, problem = Answers(sock).next()
    assert (status, "Host header" in str(problem["detail"])) == (400, True)
    assert "request not handled" not in caplog.text


def test_a_slow_body_has_time_for_its_length(png: bytes) -> None:
    """It takes longer than each MiB of it may take, and is answered."""
    whole = request_of(png + bytes(4 * 2**20))
    with ApplicationServer(body_timeout_s=0.6) as server, socket.create_connection(server.address, timeout=60) as sock:
        for start in range(0, len(whole), 2**20):
            sock.sendall(whole[start : start + 2**20])
            time.sleep(0.2)
        assert Answers(sock).next()[0] == 200


def test_slow_uploads_take_no_place_from_health(png: bytes) -> None:
    """Beyond the bound one is refused, and not waited for."""
    upload = request_of(png)[:-1]
    with ApplicationServer(max_connections=2) as server, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(server.address, timeout=60)).sendall(upload)
        wait_until(lambda: server.connections == 2)
        for _ in range(4):
            with socket.create_connection(server.address, timeout=60) as sock:
                sock.sendall(upload)
                answers = Answers(sock)
                assert answers.next()[0] == 503
                assert answers.ended()
        wait_until(lambda: server.connections == 2)
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_trailers_are_dropped_and_bounded(png: bytes) -> None:
    """A key that comes after the body opens nothing, and trailers without end are refused."""
    chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\n" % (len(png), png)
    with ApplicationServer(api_keys="key") as server, socket.create_connection(server.address, timeout=60) as sock:
        answers = Answers(sock)
        sock.sendall(chunked + body + b"X-API-Key: key\r\n\r\n")
        assert answers.next()[0] == 401
    with ApplicationServer() as server, socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(chunked + body + b"x: " + b"y" * 400_000)
        answers = Answers(sock)
        status, _, problem = answers.next()
        assert (status, problem["code"]) == (431, "headers_too_large")
        assert answers.ended()


def test_an_answer_on_its_way_is_not_replaced_by_the_next_request_s_error(server: ApplicationServer, png: bytes) -> None:
    """Garbage after a request gets its 400 after the request's own answer."""
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(request_of(png) + b"\x16\x03\x01 hello\r\n\r\n")
        answers = Answers(sock)
        assert [answers.next()[0] for _ in range(2)] == [200, 400]
        assert answers.ended()


def test_a_body_that_is_refused_early_is_read_to_its_end(png: bytes) -> None:
    """Whoever sends everything before it reads finds the refusal, and the connection as it was."""
    with ApplicationServer(max_body_bytes=1000) as server, socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(request_of(bytes(1_000_000)) + HEALTH)
        answers = Answers(sock)
        assert [answers.next()[0] for _ in range(2)] == [413, 200]


def test_a_client_that_is_refused_before_it_sends_its_body_is_disconnected(png: bytes) -> None:
    """After ``Expect: 100-continue`` and a refusal nobody knows whether the body will come."""
    with ApplicationServer(api_keys="key") as server, socket.create_connection(server.address, timeout=60) as sock:
        request = request_of(png, "/predict", "Expect: 100-continue")
        sock.sendall(request[: -len(png)])
        answers = Answers(sock)
        assert answers.next()[0] == 401
        assert answers.ended()
