"""What a request may not say, byte by byte, and what nobody may make the service hold for him."""

from __future__ import annotations

import asyncio
import base64
import gzip
import re
import socket
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.observability.request_record import Scope
from service.routes.app import Application
from service.routes.classification import Call
from service.settings import load_settings
from service.web.exchange import Exchange
from tests.support.image_file import encoded
from tests.support.patience import until, wait_until
from tests.support.scripted_engine import ApplicationServer, ScriptedEngine

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE_FILE = "/page/swagger/swagger-ui-bundle.js"


@pytest.fixture(scope="module")
def server() -> Iterator[ApplicationServer]:
    with ApplicationServer() as server:
        yield server


def head_of(*headers: str, version: str = "1.1", method: str = "POST") -> bytes:
    lines = (f"{method} /predict HTTP/{version}", "Content-Type: image/png", *headers, "", "")
    return "\r\n".join(lines).encode()


def chunked(body: bytes, trailers: bytes = b"", size: int = 10**9) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers


def statuses(server: ApplicationServer, sent: bytes) -> list[int]:
    """Send it, end the client's side, and return the status of every answer, interim ones too."""
    with socket.create_connection(server.address, timeout=60) as sock, sock.makefile("rb") as file:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", file.read())]


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: x", "Transfer-Encoding: gzip, chunked"),
        ("Host: x", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked"),
        ("Host: x", "Transfer-Encoding: , chunked"),
        ("Host: x", "Transfer-Encoding: gzip, chunked", "Connection: upgrade", "Upgrade: h2c"),
        ("Host: x/y", "Transfer-Encoding: chunked"),
        ("Host: user@x", "Transfer-Encoding: chunked"),
        ("Host: x:port", "Transfer-Encoding: chunked"),
        ("Host: [x", "Transfer-Encoding: chunked"),
    ],
)
def test_a_framing_or_host_that_cannot_be_relied_on_is_refused(
    server: ApplicationServer, png: bytes, headers: tuple[str, ...]
) -> None:
    """And nothing that follows is taken for another request."""
    assert statuses(server, head_of(*headers) + chunked(png) + b"\r\n" + HEALTH) == [400]


def test_http_1_0_has_no_chunks_and_no_interim_responses(server: ApplicationServer, png: bytes) -> None:
    """RFC 9112, section 6.1 and RFC 9110, section 10.1.1."""
    assert statuses(server, head_of("Transfer-Encoding: chunked", version="1.0") + chunked(png) + b"\r\n") == [400]
    length = f"Content-Length: {len(png)}"
    assert statuses(server, head_of("Expect: 100-continue", length, version="1.0") + png) == [200]
    assert statuses(server, head_of("Host: x", "Expect: 100-continue", length) + png) == [100, 200]
    assert statuses(server, head_of("Connection: upgrade", "Upgrade: h2c", length, version="1.0") + png + HEALTH) == [200]


def test_spaces_around_a_header_s_value_are_none_of_it(server: ApplicationServer, png: bytes) -> None:
    """RFC 9110, section 5.5."""
    framing = ("Transfer-Encoding: \tchunked ", "Expect:100-continue\t", "X-Request-Timeout-Ms: 5000  ")
    assert statuses(server, head_of("Host:x ", *framing) + chunked(png) + b"\r\n" + HEALTH) == [100, 200, 200]


@pytest.mark.parametrize("host", ["[::1]:8000", "my_upstream", "", "xn--bcher-kva.example:", "a%41"])
def test_every_host_that_is_one_is_accepted(server: ApplicationServer, host: str) -> None:
    assert statuses(server, HEALTH.replace(b"Host: x", f"Host: {host}".encode())) == [200]


def test_a_refused_head_request_gets_no_body(server: ApplicationServer) -> None:
    """Its answer ends with the headers, whatever was wrong."""
    with socket.create_connection(server.address, timeout=60) as sock, sock.makefile("rb") as file:
        sock.sendall(b"HEAD /health HTTP/1.1\r\n\r\n")
        answer = file.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "trailers",
    [b"x: " + b"y" * 70_000, b"x: " + b"y" * 70_000 + b"\r\n\r\n", b"a: b\r\n" * 12_000 + b"\r\n", b"a: b\r\n" * 12_000],
    ids=["unfinished", "one", "many", "many unfinished"],
)
def test_more_trailers_than_headers_may_have_are_refused(server: ApplicationServer, png: bytes, trailers: bytes) -> None:
    """Whatever else comes in the same read."""
    sent = head_of("Host: x", "Transfer-Encoding: chunked") + chunked(png, trailers)
    with socket.create_connection(server.address, timeout=60) as sock, sock.makefile("rb") as file:
        sock.sendall(sent)
        assert file.readline().startswith(b"HTTP/1.1 431 ")


def test_what_is_no_header_is_not_counted_as_one(server: ApplicationServer) -> None:
    """Neither the sizes of many small chunks nor the requests behind some trailers."""
    image = encoded(Image.effect_noise((200, 200), 90))
    sent = head_of("Host: x", "Transfer-Encoding: chunked") + chunked(image, b"x: " + b"y" * 2_000 + b"\r\n\r\n", size=2)
    assert statuses(server, sent + HEALTH * 2_000) == [200] * 2_001


def test_a_client_that_does_not_read_is_not_answered_from_memory(png: bytes) -> None:
    """Many requests for much in one piece are answered as their answers are read, and the client is cut off in the end."""

    def answered(url: str) -> int:
        text = httpx.get(f"{url}/metrics").text
        found = re.search(r'service_requests_total\{route="/page/\{name:path\}",status="200"\} (\d+)', text)
        return int(found[1]) if found else 0

    request = f"GET {LARGE_FILE} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with ApplicationServer(body_timeout_s=0.5) as server, socket.create_connection(server.address, timeout=60) as sock:
        size = len(httpx.get(server.url + LARGE_FILE, headers={"Accept-Encoding": "identity"}).content)
        sock.sendall(request * 20)
        with sock.makefile("rb") as file:
            for _ in range(20):
                while file.readline().strip():
                    pass
                assert len(file.read(size)) == size
        sock.sendall(request * 300)
        wait_until(lambda: answered(server.url) > 21)
        wait_until(lambda: server.connections == 1)  # that of the question
        assert answered(server.url) < 100


@pytest.mark.parametrize(
    "text", ["1_000", "+5000", "5000,6000", "inf", "nan", "0x10", "\u0661", "1" * 5_000, "5 000", "", "1e"]
)
def test_a_timeout_in_another_notation_is_refused(server: ApplicationServer, png: bytes, text: str) -> None:
    """Python would take most of them for numbers."""
    headers = [(b"Content-Type", b"image/png"), (b"X-Request-Timeout-Ms", text.encode())]
    assert httpx.post(f"{server.url}/predict", content=png, headers=headers).status_code == 400


@pytest.mark.parametrize("text", ["30000", "30000.5", "3e4", "30000.", "999999999999999999"])
def test_usual_notations_of_a_timeout_are_accepted(server: ApplicationServer, png: bytes, text: str) -> None:
    headers = {"Content-Type": "image/png", "X-Request-Timeout-Ms": text}
    assert httpx.post(f"{server.url}/predict", content=png, headers=headers).status_code == 200


@pytest.mark.parametrize("value", ["0_1", "+0.5", " 0.5", "\u0660", "0.5 ", "infinity", "true"])
def test_a_threshold_in_another_notation_is_refused(server: ApplicationServer, png: bytes, value: str) -> None:
    """In the query and in JSON, where it must be a number."""
    answer = httpx.post(f"{server.url}/hf", params={"threshold": value}, content=png)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")


@pytest.mark.parametrize("value", [True, "0.5", [0.5], {}, 2, -0.1])
def test_a_threshold_of_another_type_is_refused(server: ApplicationServer, png: bytes, value: object) -> None:
    body = {"inputs": base64.b64encode(png).decode(), "parameters": {"threshold": value}}
    assert httpx.post(f"{server.url}/predict", json=body).status_code == 422


def test_an_option_that_is_given_twice_is_refused(server: ApplicationServer, png: bytes) -> None:
    """In the query, in the form, in JSON, or in two of them; which one is said."""
    inputs = base64.b64encode(png).decode()
    with httpx.Client(base_url=server.url) as client:
        answers = [
            client.post("/hf?top_k=1&top_k=1", content=png),
            client.post("/predict", files=[("file", png), ("top_k", (None, "1")), ("top_k", (None, "2"))]),
            client.post("/predict/batch", files=[("file", png), ("top_k", (None, "1")), ("top_k", (None, "2"))]),
            client.post("/predict?top_k=2", files=[("file", png), ("top_k", (None, "1"))]),
            client.post("/predict?top_k=2", json={"inputs": inputs, "parameters": {"top_k": 1}}),
        ]
        for answer in answers:
            assert (answer.status_code, "top_k" in answer.json()["detail"]) == (422, True)
        both = client.post("/predict?threshold=0.5", files=[("file", png), ("top_k", (None, "1"))])
        assert len(both.json()["predictions"]) == 1
        batch = client.post("/predict/batch", files=[("file", png), ("file", png), ("top_k", (None, "1"))])
        assert [len(each["predictions"]) for each in batch.json()["results"]] == [1, 1]


@pytest.mark.parametrize("data", [[True] * 3072, [1] * 3071 + [False], [[[[1] * 32] * 32] * 2 + [[[1] * 31 + [True]] * 32]]])
def test_booleans_are_no_pixels(server: ApplicationServer, data: list[object]) -> None:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": data}
    answer = httpx.post(f"{server.url}/v2/models/scripted/infer", json={"inputs": [tensor]})
    assert (answer.status_code, "UINT8" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [("gzip", "gzip"), ("GZIP;Q=0.5", "gzip"), ("br, gzip;q=0.1", "gzip"), ("gzip;q=0", None), ("gzip;q=0.000, *", None)],
)
def test_a_file_is_compressed_for_who_accepts_it(server: ApplicationServer, accepted: str, encoding: str | None) -> None:
    answer = httpx.get(f"{server.url}/page/page.js", headers={"Accept-Encoding": accepted})
    assert answer.headers.get("content-encoding") == encoding


@pytest.mark.parametrize("weak", ["W/", ""])
def test_a_file_that_the_client_has_is_not_sent_again(server: ApplicationServer, weak: str) -> None:
    """Proxies that compress make the tag weak or strong; ``*`` is any version."""
    tag = httpx.get(f"{server.url}/page/page.js").headers["etag"].removeprefix("W/")
    for known in (f'"other", {weak}{tag}', "*"):
        assert httpx.get(f"{server.url}/page/page.js", headers={"If-None-Match": known}).status_code == 304


def test_an_admin_s_key_is_looked_at_before_the_body() -> None:
    """Whoever has none does not have it inflated, nor is he asked to send it."""
    with ApplicationServer(admin_key="secret") as server:
        body = gzip.compress(bytes(10**6))[:-4]
        answer = httpx.post(f"{server.url}/admin/reload", content=body, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 401
        head = b"POST /admin/reload HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n"
        assert statuses(server, head) == [401]


def test_a_caller_is_one_whatever_the_spelling_of_his_address(png: bytes) -> None:
    """Behind a proxy, over IPv6 or by an IPv4 address within one."""
    callers = [["1.2.3.4", "::ffff:1.2.3.4", "::FFFF:102:304"], ["2001:db8::1", "2001:DB8:0::1", "[2001:db8:0:0:0:0:0:1]:99"]]
    with ApplicationServer(rate_limit="2/hour", trusted_proxies="127.0.0.0/8") as server, httpx.Client() as client:
        for spellings in callers:
            answers = [client.post(f"{server.url}/hf", content=png, headers={"X-Forwarded-For": each}) for each in spellings]
            assert [answer.status_code for answer in answers] == [200, 200, 429]


@pytest.mark.parametrize(
    "made_up",
    [
        "X-Forwarded-For: 6.6.6.{}, 1.2.3.4, , \r\nForwarded: for=1.2.3.4;proto=https",
        "X-Forwarded-For: 6.6.6.{}\r\nForwarded: for=1.2.3.4",
        "X-Forwarded-For: 1.2.3.4\r\nForwarded: for=6.6.6.{}",
        'Forwarded: for=1.2.3.4;host="a, for=6.6.6.{}"',
        'Forwarded: for=1.2.3.4;host="\\";for=6.6.6.{}"',
        'Forwarded: for=6.6.6.{};x=", for=1.2.3.4;host="a"',
        'Forwarded: for="6.6.6.{}, for=1.2.3.4',
        "Forwarded: " + "a" * 60_000 + "{}",
        "X-Forwarded-For: 6.6.6.{}" + ", 127.0.0.1" * 5_000,
        'X-Forwarded-For: 2001:db8:1:2::{}\r\nForwarded: for="[2001:DB8:1:2:0:0:0:{}]:80"',
    ],
)
def test_a_caller_has_no_say_in_his_address(made_up: str) -> None:
    """Whatever he sends in the headers that the proxy adds to, or passes on, and from the 2**64 addresses of a household."""
    request = "GET /v2 HTTP/1.1\r\nHost: x\r\n{}\r\n\r\n"
    with ApplicationServer(rate_limit="2/hour", trusted_proxies="127.0.0.0/8") as server:
        sent = "".join(request.format(made_up.replace("{}", number)) for number in "123")
        assert statuses(server, sent.encode()) == [200, 200, 429]


def test_only_a_whole_segment_is_a_root_path() -> None:
    """Under an ASGI server that has one, with a slash at its end or without."""

    async def ask(root_path: str, path: str) -> int:
        app = Application(load_settings([]), ScriptedEngine())
        transport = httpx.ASGITransport(app=app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get(path)).status_code

    for root_path in ("/api", "/api/"):
        asked = [asyncio.run(ask(root_path, path)) for path in ("/api/health", "/health", "/apix/health", "/api/api/health")]
        assert asked == [200, 200, 404, 404]


def test_a_call_that_is_cancelled_as_it_is_read_goes_no_further() -> None:
    """Python 3.11 loses a cancellation that comes together with the result of a thread."""

    async def run() -> int:
        engine, loop = ScriptedEngine(), asyncio.get_running_loop()
        app = Application(load_settings([]), engine)

        def read(call: Call) -> NDArray[np.uint8]:
            loop.call_soon_threadsafe(call.cancel)
            return np.zeros((1, 3, 32, 32), np.uint8)

        exchange = Exchange(Scope("POST", "/hf"), app.entry, 0, lambda exchange, reply: None)
        exchange.deadline = time.monotonic() + 60
        call = Call(app.context, exchange, read, lambda call, outcome: None, reads_long=True)
        call.begin()
        await until(lambda: call._is_over)
        await asyncio.sleep(0.01)
        app.close()
        return len(engine.submitted)

    assert [asyncio.run(run()) for _ in range(5)] == [0] * 5
