"""Every row of the contract's error table, over real sockets."""

from __future__ import annotations

import base64
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack
from typing import Any

import httpx
import pytest

from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from service.settings import SettingsError, load_settings
from service.web.rate_limit import open_rate_limiter
from tests.support.patience import wait_until
from tests.support.scripted_engine import ApplicationServer

MAX_BODY_BYTES = 300_000
Send = Callable[[httpx.Client], httpx.Response]
PNG_HEADERS = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def server() -> Iterator[ApplicationServer]:
    with ApplicationServer(max_body_bytes=MAX_BODY_BYTES, max_images_per_request=4) as server:
        yield server


@pytest.fixture
def client(server: ApplicationServer) -> Iterator[httpx.Client]:
    fresh = type(server.engine)()
    server.engine.__dict__.clear()
    server.engine.__dict__.update(fresh.__dict__)
    server.supervisor.draining = server.supervisor.engine_gave_up = False
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Require a whole RFC 9457 problem with this status and code that tells nothing of the inside; give it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "code", "detail", "request_id"}
    assert body["status"] == status
    assert body["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["detail"].strip()
    for secret in ("Traceback", "Error(", "Exception", ".py", "/tmp", "site-packages", "0x"):
        assert secret not in body["detail"]
    return body


def multipart(boundary: str, content: bytes, content_type: str | None = None) -> Send:
    headers = {"Content-Type": content_type or f"multipart/form-data; boundary={boundary}"}
    return lambda client: client.post("/predict", content=content, headers=headers)


def json_body(content: bytes | str) -> Send:
    return lambda client: client.post("/predict", content=content, headers={"Content-Type": "application/json"})


MALFORMED: dict[str, Send] = {
    "multipart without boundary": multipart("", b"x", "multipart/form-data"),
    "multipart of garbage": multipart("b", b"no form at all"),
    "multipart cut short": multipart("b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc'),
    "multipart without a name": multipart("b", b"--b\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--b--\r\n"),
    "empty multipart body": multipart("b", b""),
    "two files in one form": lambda client: client.post("/predict", files=[("file", b"a"), ("file", b"b")]),
    "too many fields": lambda client: client.post("/predict", files=[(f"f{index}", b"a") for index in range(50)]),
    "broken JSON": json_body("{"),
    "JSON that is no object": json_body("[1]"),
    "JSON without inputs": json_body("{}"),
    "JSON inputs of another type": json_body('{"inputs": 5}'),
    "JSON parameters of another type": json_body('{"inputs": "aGk=", "parameters": 3}'),
    "bad base64": json_body('{"inputs": "%%%"}'),
    "bad data URI": json_body('{"inputs": "data:image/png,abc"}'),
    "a URL": json_body('{"inputs": "http://127.0.0.1/cat.png"}'),
    "a file URL": json_body('{"inputs": "file:///etc/passwd"}'),
    "JSON top_k of another type": json_body('{"inputs": "aGk=", "parameters": {"top_k": "3"}}'),
    "JSON top_k true": json_body('{"inputs": "aGk=", "parameters": {"top_k": true}}'),
    "JSON in another encoding": json_body('{"inputs": "é"}'.encode("utf-16")),
    "top_k of another type": lambda client: client.post("/predict?top_k=many", content=b"x", headers=PNG_HEADERS),
    "top_k with a fraction": lambda client: client.post("/predict?top_k=1.5", content=b"x", headers=PNG_HEADERS),
    "timeout that is no number": lambda client: client.post(
        "/predict", content=b"x", headers={**PNG_HEADERS, "X-Request-Timeout-Ms": "soon"}
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_400_malformed_request(client: httpx.Client, case: str) -> None:
    """A body or parameter that cannot be parsed says what is wrong with it."""
    check_problem(MALFORMED[case](client), 400, "malformed_request")


def test_401_unauthorized(tmp_path: Path, png: bytes) -> None:
    """With keys configured, no key and a wrong key are refused, either header's right key is taken, health stays open."""
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xef\xbb\xbffrom#the-file  # ours\n# who\n\n")
    with (
        ApplicationServer(api_keys="first, second", api_keys_file=keys) as server,
        httpx.Client(base_url=server.url) as client,
    ):

        def ask(**headers: str) -> httpx.Response:
            return client.post(
                "/predict", content=png, headers={**PNG_HEADERS, **{k.replace("_", "-"): v for k, v in headers.items()}}
            )

        for wrong in (
            {},
            {"X_API_Key": "third"},
            {"X_API_Key": ""},
            {"Authorization": "Bearer firs"},
            {"Authorization": "Basic first"},
        ):
            response = ask(**wrong)
            check_problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        mixed = {"X_API_Key": "", "Authorization": "Bearer second"}
        for right in (
            mixed,
            {"X_API_Key": "a proxy's", "Authorization": "Bearer second"},
            {"X_API_Key": "first", "Authorization": "Basic a proxy's"},
            {"X_API_Key": "first"},
            {"Authorization": "Bearer second"},
            {"Authorization": "bearer from#the-file"},
        ):
            assert ask(**right).status_code == 200
        assert client.get("/labels").status_code == client.get("/samples").status_code == 401
        for path in ("/health", "/health/live", "/health/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_a_file_of_keys_counts_as_it_is_now(tmp_path: Path, png: bytes) -> None:
    """A key replaced by one as long, its times kept, is noticed; an emptied file admits nobody; a lost one stays."""
    keys = tmp_path / "keys"

    def write(text: str) -> None:
        keys.write_text(text)
        os.utime(keys, (1, 1))

    def answers_of(client: httpx.Client) -> list[int]:
        return [
            client.post("/hf", content=png, headers={"X-API-Key": key}).status_code for key in ("key-one", "key-two", "fixed")
        ]

    write("key-one")
    with ApplicationServer(api_keys="fixed", api_keys_file=keys) as server, httpx.Client(base_url=server.url) as client:
        assert answers_of(client) == [200, 401, 200]
        write("key-two")
        wait_until(lambda: answers_of(client) == [401, 200, 200])
        keys.unlink()
        assert answers_of(client) == [401, 200, 200]
        write("")
        wait_until(lambda: answers_of(client) == [401, 401, 200])


def test_404_not_found(client: httpx.Client) -> None:
    """An unknown path points to the documentation."""
    assert "/docs" in check_problem(client.get("/nothing/here"), 404, "not_found")["detail"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/predict"), ("PUT", "/predict/batch"), ("POST", "/health")])
def test_405_method_not_allowed(client: httpx.Client, method: str, path: str) -> None:
    """A known path says which methods it answers, in the Allow header too."""
    response = client.request(method, path)
    check_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == ("GET, HEAD" if path == "/health" else "POST")


def test_413_body_too_large_by_its_length(client: httpx.Client) -> None:
    """A declared length above the limit is refused with the limit in the detail."""
    response = client.post("/predict", content=b"x" * (MAX_BODY_BYTES + 1), headers=PNG_HEADERS)
    assert f"{MAX_BODY_BYTES:,}" in check_problem(response, 413, "body_too_large")["detail"]


def test_413_body_too_large_is_cut_off_while_reading(server: ApplicationServer, client: httpx.Client) -> None:
    """A chunked body without end is answered as soon as the limit is passed, while it is still being sent."""
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(MAX_BODY_BYTES // 0x10000 + 1):
            sock.sendall(chunk)
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")  # the last chunk was never sent
    check_problem(
        client.post("/predict", content=(b"x" * 50_000 for _ in range(7)), headers=PNG_HEADERS), 413, "body_too_large"
    )


def test_413_image_too_large_is_told_from_the_header(client: httpx.Client) -> None:
    """A PNG of 60 megapixels in 200 kB is refused without its pixels being unpacked."""
    rows = zlib.compressobj(9)
    line = b"\0" + bytes(10_000 * 3)
    data = b"".join(rows.compress(line) for _ in range(6000)) + rows.flush()
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", pack(">IIBBBBB", 10_000, 6000, 8, 2, 0, 0, 0))
    bomb += png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    assert 100_000 < len(bomb) < 250_000
    detail = check_problem(client.post("/predict", content=bomb, headers=PNG_HEADERS), 413, "image_too_large")["detail"]
    assert "60,000,000" in detail


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))


def test_415_unsupported_media_type(client: httpx.Client, png: bytes) -> None:
    """Another Content-Type, none at all for what is no image, and an image format that is not listed."""
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/xml"}):
        check_problem(client.post("/predict", content=png, headers=headers), 415, "unsupported_media_type")
    check_problem(client.post("/predict", content=b"no image"), 415, "unsupported_media_type")
    check_problem(client.post("/predict/batch", content=png, headers=PNG_HEADERS), 415, "unsupported_media_type")
    for foreign in (b"II*\0" + bytes(100), b"\0\0\0\x0cJXL " + bytes(100)):
        check_problem(client.post("/predict", files={"file": foreign}), 415, "unsupported_media_type")


def test_422_missing_file(client: httpx.Client, png: bytes) -> None:
    """A form whose image goes by another name is told the right one."""
    for path in ("/predict", "/predict/batch"):
        assert "file" in check_problem(client.post(path, files={"image": png}), 422, "missing_file")["detail"]


def test_422_invalid_image(client: httpx.Client, png: bytes) -> None:
    """Empty, cut short, garbage, text, and a sound header over damaged data."""
    for data in (
        b"",
        png[:60],
        png[:-200],
        b"\xff\xd8\xff" + bytes(50),
        b"GIF89a",
        b"hello",
        png[:200] + bytes(len(png) - 200),
    ):
        check_problem(client.post("/predict", files={"file": ("x", data)}), 422, "invalid_image")
        check_problem(client.post("/predict", content=data, headers=PNG_HEADERS), 422, "invalid_image")
    text = base64.b64encode(png[:60]).decode()
    check_problem(client.post("/predict", json={"inputs": text}), 422, "invalid_image")


@pytest.mark.parametrize("top_k", ["0", "-1", "4", "99999"])
def test_422_invalid_parameter(client: httpx.Client, png: bytes, top_k: str) -> None:
    """``top_k`` outside 1 to the number of classes names the range."""
    response = client.post(f"/predict?top_k={top_k}", content=png, headers=PNG_HEADERS)
    assert "between 1 and 3" in check_problem(response, 422, "invalid_parameter")["detail"]


def test_422_too_many_files_and_timeouts_out_of_range(client: httpx.Client, png: bytes) -> None:
    """More files than the limit, and a deadline that is not after now, are refused whole."""
    check_problem(client.post("/predict/batch", files=[("file", png)] * 5), 422, "invalid_parameter")
    headers = {**PNG_HEADERS, "X-Request-Timeout-Ms": "0"}
    check_problem(client.post("/predict", content=png, headers=headers), 422, "invalid_parameter")


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/predict", "top_k, unknown, threshold"),
        ("/predict/batch", "top_k, unknown, threshold"),
        ("/hf", "top_k, unknown, threshold"),
        ("/explain", "only the query parameters label"),
        ("/view", "no query parameters"),
        ("/health/live", "no query parameters"),
        ("/labels", "no query parameters"),
        ("/metrics", "no query parameters"),
    ],
)
def test_422_unknown_query_parameters(client: httpx.Client, png: bytes, path: str, known: str) -> None:
    """A name that the route does not know gets those that it knows; a known one beside it does not help."""
    method = "GET" if path in ("/health/live", "/labels", "/metrics") else "POST"
    for query in ("topk=2", "top_k=2&label=cat&x", "%F2%BD=%C3%A9", "top_k=2" + 16 * "&a"):
        response = client.request(method, f"{path}?{query}", content=png, headers=PNG_HEADERS)
        assert response.status_code == 422
        assert known in response.json()["detail"]
    assert client.get("/?utm_source=news").status_code == 200


def test_422_unknown_query_parameters_in_the_open_inference_protocol(client: httpx.Client) -> None:
    """In its own shape of an error."""
    for method, path in (("GET", "/v2/health/ready"), ("POST", "/v2/models/scripted/infer")):
        response = client.request(method, f"{path}?top_k=1")
        assert (response.status_code, list(response.json())) == (422, ["error"])


def test_429_overloaded(server: ApplicationServer, client: httpx.Client, png: bytes) -> None:
    """A full queue says in whole seconds when to come back."""
    server.engine.refuse = Overloaded("the queue is full; retry after the time given", retry_after_s=3)
    response = client.post("/predict", content=png, headers=PNG_HEADERS)
    check_problem(response, 429, "overloaded")
    assert response.headers["retry-after"] == "3"


def test_429_before_anything_is_decoded(server: ApplicationServer, client: httpx.Client) -> None:
    """A full queue refuses what it would only find damaged later: the image is not looked at."""
    server.engine.no_room = Overloaded("the queue is full; retry after the time given", retry_after_s=3)
    check_problem(client.post("/predict", content=b"no image", headers=PNG_HEADERS), 429, "overloaded")
    entry = client.post("/predict/batch", files=[("file", b"no image")]).json()["results"][0]
    assert entry["error"]["code"] == "overloaded"
    assert not server.engine.submitted


@pytest.mark.parametrize("rate", ["0/second", "1/second;2/minute", "fast"])
def test_a_rate_limit_that_makes_no_sense_ends_the_start(rate: str) -> None:
    with pytest.raises(SettingsError, match="write it like '100/second'"):
        open_rate_limiter(load_settings([f"--rate_limit={rate}"]))


def test_429_for_a_caller_above_the_rate_limit(png: bytes) -> None:
    """Each key has its own count; made-up keys do not get round the limit of an address; health is not counted."""
    with ApplicationServer(rate_limit="2/hour", api_keys="a,b") as server, httpx.Client(base_url=server.url) as client:
        keys = ["a", "a", "b", "a", "b", "b"]
        answers = [client.post("/predict", content=png, headers={**PNG_HEADERS, "X-API-Key": key}) for key in keys]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 200, 429]
        check_problem(answers[3], 429, "rate_limited")
        wait_s = int(answers[3].headers["retry-after"])
        assert 0 < wait_s <= 3600
        assert answers[3].headers["ratelimit"] == f'"default";r=0;t={wait_s}'
        assert answers[3].headers["ratelimit-policy"] == '"default";q=2;w=3600'
        for path in ("/health", "/metrics", "/labels", "/samples"):
            assert {client.get(path, headers={"X-API-Key": "a"}).status_code for _ in range(4)} == {200}
    with ApplicationServer(rate_limit="2/hour") as server, httpx.Client(base_url=server.url) as client:
        statuses = [client.post("/hf", content=png, headers={"X-API-Key": str(number)}).status_code for number in range(4)]
        assert statuses == [200, 200, 429, 429]


def test_a_caller_is_one_whatever_the_spelling_of_his_key(png: bytes) -> None:
    """The count is the key's, by either header, in any case of the scheme, with spaces."""
    spellings = [("X-API-Key", "a"), ("Authorization", "Bearer a"), ("Authorization", "bearer  a")]
    with ApplicationServer(rate_limit="2/hour", api_keys="a,b") as server, httpx.Client(base_url=server.url) as client:
        answers = [client.post("/hf", content=png, headers=[spelling]) for spelling in spellings]
        assert [answer.status_code for answer in answers] == [200, 200, 429]


def test_500_inference_failed(server: ApplicationServer, client: httpx.Client, png: bytes) -> None:
    """A device that fails on this image after the retry is told apart from a fault of the service."""
    server.engine.answer = lambda images: InferenceFailed("the model failed on this image; send another")
    check_problem(client.post("/predict", content=png, headers=PNG_HEADERS), 500, "inference_failed")


def test_503_not_ready(server: ApplicationServer, client: httpx.Client, png: bytes) -> None:
    """Before there is a model, and when the engine goes down under a request, Retry-After is given."""
    server.engine.answer = lambda images: NotReady("the engine stopped; retry", retry_after_s=1)
    response = client.post("/predict", content=png, headers=PNG_HEADERS)
    check_problem(response, 503, "not_ready")
    assert response.headers["retry-after"] == "1"
    server.engine.model, server.engine.state = None, "starting"
    check_problem(client.post("/predict", content=png, headers=PNG_HEADERS), 503, "not_ready")
    check_problem(client.get("/labels"), 503, "not_ready")


def test_504_deadline_exceeded(server: ApplicationServer, client: httpx.Client, png: bytes) -> None:
    """A deadline that passes in the queue takes the request out of the engine; a hopeless one is refused at once."""
    server.engine.answer = lambda images: None
    headers = {**PNG_HEADERS, "X-Request-Timeout-Ms": "20"}
    check_problem(client.post("/predict", content=png, headers=headers), 504, "deadline_exceeded")
    assert server.engine.cancelled == server.engine.submitted
    server.engine.refuse = DeadlineExceeded("the deadline cannot be met with this backlog; retry later")
    check_problem(client.post("/predict", content=png, headers=PNG_HEADERS), 504, "deadline_exceeded")


def test_a_fault_of_ours_is_a_problem_without_its_insides(
    server: ApplicationServer, client: httpx.Client, png: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """An unforeseen exception is answered, logged with the request id, and told to nobody; the service goes on."""

    def fail(images: object) -> None:
        raise RuntimeError("secret /etc/passwd")

    server.engine.answer = fail
    response = client.post("/predict", content=png, headers=PNG_HEADERS)
    body = check_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    assert any(body["request_id"] in record.getMessage() for record in caplog.records)
    client.get("/health").raise_for_status()


def test_an_insane_request_id_is_replaced(client: httpx.Client) -> None:
    """An id that could break a log line is not echoed; a new one is made for every request."""
    first = client.get("/nothing", headers={"X-Request-ID": "a b\tc" * 60}).headers["x-request-id"]
    second = client.get("/nothing").headers["x-request-id"]
    assert first != second
    assert len(first) == len(second) == 32


@pytest.mark.parametrize(
    ("state", "draining", "gave_up", "expected", "health", "live"),
    [
        ("ready", False, False, "ready", 200, 200),
        ("starting", False, False, "starting", 503, 200),
        ("ready", True, False, "draining", 503, 200),
        ("failed", False, False, "failed", 503, 503),
        ("starting", False, True, "failed", 503, 503),
    ],
)
def test_health_tells_each_state(
    server: ApplicationServer,
    client: httpx.Client,
    state: Any,
    draining: bool,
    gave_up: bool,
    expected: str,
    health: int,
    live: int,
) -> None:
    """Ready answers for predictions, live for the process; both bodies name the state."""
    server.engine.state = state
    server.supervisor.draining, server.supervisor.engine_gave_up = draining, gave_up
    for path, status in (("/health", health), ("/health/ready", health), ("/health/live", live)):
        response = client.get(path)
        assert response.status_code == status
        assert response.json()["status"] == expected


def test_a_client_that_leaves_takes_its_request_out_of_the_engine(
    server: ApplicationServer, client: httpx.Client, png: bytes
) -> None:
    """A connection that closes while its request waits cancels the request."""
    server.engine.answer = lambda images: None
    with socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%s" % (len(png), png)
        )
        wait_until(lambda: bool(server.engine.submitted))
    wait_until(lambda: bool(server.engine.cancelled))
    assert server.engine.cancelled == server.engine.submitted


def test_cors_is_off_unless_configured(client: httpx.Client, png: bytes) -> None:
    """Without the setting no answer allows other origins; with it, the named ones may call, refusals included."""
    origin = {"Origin": "https://app.example"}
    assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    with ApplicationServer(cors_origins="https://app.example") as server, httpx.Client(base_url=server.url) as own:
        for response in (own.get("/health", headers=origin), own.post("/predict", headers=origin)):
            assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-origin" not in own.get("/health", headers={"Origin": "https://evil.example"}).headers
