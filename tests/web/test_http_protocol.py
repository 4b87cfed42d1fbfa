"""What a client can do to the server before it has sent a whole request: nothing that others would notice."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.certificate import self_signed
from benchmarks.servers.service_process import ServiceProcess
from tests.support.patience import wait_until

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def service(checkpoint_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(checkpoint_path, workers=1, max_connections=20, header_timeout_s=0.5, body_timeout_s=0.5) as running:
        yield running


def answer_of(sock: socket.socket) -> tuple[int, dict[str, object]]:
    """Read until the server closes; give the status and the problem."""
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "sent",
    [b"POST /pre", HEAD, HEAD + b"Content-Length: 100\r\n\r\nabc", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["request line", "headers", "body", "chunk"],
)
def test_a_request_that_does_not_go_on_is_ended(service: ServiceProcess, sent: bytes) -> None:
    """A client that stops in the middle of its headers or body is told so and disconnected."""
    with service.connect() as sock:
        sock.sendall(sent)
        status, problem = answer_of(sock)
    assert status == 408
    assert problem["code"] == "request_timeout"


def test_a_connection_on_which_nothing_comes_is_closed(service: ServiceProcess) -> None:
    """It costs a place only for a while, and gets no answer that nobody asked for."""
    with service.connect() as sock:
        assert sock.recv(1) == b""


def test_headers_without_end_are_refused(service: ServiceProcess) -> None:
    """Header bytes have a bound, so that no client fills the memory with them."""
    with service.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        line = b"x: " + b"y" * 1000 + b"\r\n"
        with pytest.raises(ConnectionError):  # noqa: PT012  # the server hangs up at some line
            for _ in range(100_000):
                sock.sendall(line)
    assert httpx.get(service.url + "/health").status_code == 200


def test_what_is_no_http_is_told_so(service: ServiceProcess) -> None:
    """Garbage gets one problem document and the end of the connection."""
    with service.connect() as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, problem = answer_of(sock)
    assert (status, problem["code"]) == (400, "malformed_request")


def test_an_answer_without_a_body_is_sent(service: ServiceProcess) -> None:
    """The head of an answer waits for its body; where there is none it goes out all the same, and the connection goes on."""
    with httpx.Client(base_url=service.url) as client:
        for _ in range(2):
            answer = client.head("/health")
            assert (answer.status_code, answer.content) == (200, b"")
            assert int(answer.headers["content-length"]) > 0
        assert client.get("/health").status_code == 200


def test_a_client_that_asks_whether_to_send_its_body_is_told(service: ServiceProcess, image_paths: list[Path]) -> None:
    """``Expect: 100-continue`` is answered before the body comes, and the answer follows it."""
    image = image_paths[0].read_bytes()
    with service.connect() as sock:
        sock.sendall(HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(image))
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(image)
        status, answer = answer_of(sock)
    assert status == 200
    assert "label" in answer


def test_connections_have_a_bound_and_come_back(service: ServiceProcess) -> None:
    """One connection too many is refused with 503 and a time to retry, unless it asks for health; then others are served."""
    with ExitStack() as stack:
        held = [stack.enter_context(service.connect()) for _ in range(20)]
        for sock in held:  # answered, so each of them has its place
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        with service.connect() as one_more, service.connect() as probe:
            one_more.sendall(HEAD + b"Content-Length: 5\r\n\r\nimage")
            status, problem = answer_of(one_more)
            probe.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer_of(probe)[0] == 200
        assert (status, problem["code"]) == (503, "not_ready")
    with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
        wait_until(lambda: client.get(service.url + "/health").status_code == 200)


def begin_handshake(sock: socket.socket, trust: ssl.SSLContext) -> Callable[[], ssl.SSLSocket]:
    """Send the first message of a TLS handshake, and return what ends it."""
    wrapped = trust.wrap_socket(sock, server_hostname="127.0.0.1", do_handshake_on_connect=False)
    wrapped.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        wrapped.do_handshake()
    assert select.select([wrapped], [], [], 60)[0]

    def finish() -> ssl.SSLSocket:
        wrapped.settimeout(60)
        wrapped.do_handshake()
        return wrapped

    return finish


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_https_by_a_certificate(checkpoint_path: Path, tmp_path: Path) -> None:
    """With a certificate the service speaks TLS, says https, and predicts; a certificate that is none is told at start.

    A handshake that is under way when the service is stopped comes to its end.
    """
    files = self_signed(tmp_path)
    key, certificate = files["tls_key"], files["tls_certificate"]
    with ServiceProcess(checkpoint_path, tls_certificate=certificate, tls_key=key) as service:
        assert service.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(service.url + "/health", verify=trust).json()["status"] == "ready"
        finish = begin_handshake(service.connect(), trust)
        service.send_signal(signal.SIGTERM)
        time.sleep(0.4)  # the listener is closed by now
        with finish() as sock:
            sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert service.wait() == 0
    broken = ServiceProcess(checkpoint_path, tls_certificate=key, tls_key=certificate)
    broken.start()
    assert broken.wait() == 2
    assert "TLS certificate" in broken.output
    broken.kill()
