"""Our HTTP protocol and any ASGI server carry the same exchanges."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.patience import wait_until
from tests.support.scripted_engine import ApplicationServer

PNG = {"Content-Type": "image/png"}
OURS_ALONE = {"date", "server", "x-request-id"}


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[ApplicationServer, ApplicationServer]]:
    settings: dict[str, Any] = {"max_body_bytes": 100_000, "cors_origins": "https://a.example", "root_path": "/classify"}
    with ApplicationServer(**settings) as ours, ApplicationServer(asgi=True, **settings) as asgi:
        yield ours, asgi


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("POST", "/predict", {"headers": PNG}),
        ("POST", "/predict?top_k=9", {"headers": PNG}),
        ("POST", "/predict", {"headers": {**PNG, "Origin": "https://a.example"}}),
        ("POST", "/classify/predict", {"headers": PNG}),
        ("POST", "/hf", {}),
        ("POST", "/predict/batch", {"headers": PNG}),
        ("POST", "/predict", {"headers": PNG, "content": bytes(100_001)}),
        ("POST", "/v2/models/scripted/infer", {"json": {}}),
        ("POST", "/predict", {"headers": {**PNG, "Content-Encoding": "gzip"}}),
        ("POST", "/hf", {"headers": {"Content-Encoding": "br"}}),
        ("GET", "/labels", {}),
        ("GET", "/", {}),
        ("HEAD", "/", {}),
        ("HEAD", "/labels", {}),
        ("HEAD", "/predict", {}),
        ("POST", "/labels", {}),
        ("GET", "/labels?top_k=1", {}),
        ("GET", "/predict", {}),
        ("GET", "/nothing", {}),
        ("OPTIONS", "/predict", {"headers": {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}}),
        ("OPTIONS", "/predict", {"headers": {"Origin": "https://b.example", "Access-Control-Request-Method": "POST"}}),
    ],
)
def test_both_give_the_same_answer(
    servers: tuple[ApplicationServer, ApplicationServer], image_paths: list[Path], method: str, path: str, options: Any
) -> None:
    """Status, headers and body are those of the exchange."""
    if method == "POST" and "json" not in options:
        options = {"content": image_paths[0].read_bytes(), **options}
    headers = {"X-Request-ID": "same", **options.pop("headers", {})}
    first, second = (httpx.request(method, server.url + path, headers=headers, **options) for server in servers)
    assert first.status_code == second.status_code
    seen = [{k: v for k, v in each.headers.items() if k not in (*OURS_ALONE, "server-timing")} for each in (first, second)]
    assert seen[0] == seen[1]
    assert first.content == second.content
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == "same"


def test_head_is_get_without_its_body(servers: tuple[ApplicationServer, ApplicationServer]) -> None:
    """On every path that GET is answered on, documentation, page and ``/v2`` included."""
    paths = [
        "/docs",
        "/page/api.js",
        *(path for path, item in httpx.get(f"{servers[0].url}/openapi.json").json()["paths"].items() if "get" in item),
    ]
    for server, path in itertools.product(servers, paths):
        url = server.url + path.format(model_name="scripted", model_version="0123456789ab")
        with httpx.Client() as client:
            get, head = client.get(url), client.head(url)
        assert (head.status_code, head.content) == (200, b"")
        assert get.headers.keys() == head.headers.keys()


def test_a_client_that_leaves_is_noticed_by_both(
    servers: tuple[ApplicationServer, ApplicationServer], image_paths: list[Path]
) -> None:
    """The request is taken out of the engine, whoever carries it."""
    png = image_paths[0].read_bytes()
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%s" % (len(png), png)
    for server in servers:
        server.engine.answer = lambda images: None
        before = len(server.engine.submitted)
        with socket.create_connection(server.address, timeout=60) as sock:
            sock.sendall(request)
            wait_until(lambda server=server, before=before: len(server.engine.submitted) > before)  # type: ignore[misc]
        wait_until(lambda server=server: bool(server.engine.cancelled))  # type: ignore[misc]
        assert server.engine.cancelled[-1] is server.engine.submitted[-1]
