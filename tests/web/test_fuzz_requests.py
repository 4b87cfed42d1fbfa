"""Mutated requests to the real service: each gets an answer in words or a closed connection, and nobody else notices."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from tests.support.mutated_requests import SoundRequest, mutated_requests, sound_requests
from tests.support.resident_memory import resident_bytes

FAST_COUNT = 500
SLOW_COUNT = 100_000
CLIENTS = 32
WARM_UP = 200
MAX_GROWTH_BYTES = 96 * 2**20  # bodies of up to 16 MiB are read whole, and the allocator keeps some of it
PATIENCE_S = 120.0  # no expectation of speed: only the end of a test that would hang

# Every answer that a ready service may give, redirects of a path with a slash too many included; 500 and 503 are none.
ANSWERS = {200, 307, 400, 404, 405, 408, 413, 415, 422, 429, 431, 504}
SECRETS = re.compile(rb"Traceback|Error\(|Exception|site-packages|\.py\b")


@pytest.fixture(scope="module")
def service(checkpoint_path: Path) -> Iterator[ServiceProcess]:
    """A service that does not wait long for what a damaged request lacks."""
    with ServiceProcess(checkpoint_path, workers=1, header_timeout_s=0.3, body_timeout_s=0.3) as running:
        yield running


@pytest.fixture(scope="module")
def requests(image_paths: list[Path]) -> list[SoundRequest]:
    return sound_requests(image_paths[0].read_bytes())


def test_the_sound_requests_are_answered(service: ServiceProcess, requests: list[SoundRequest]) -> None:
    """What is mutated are requests that get a 200, whole or in chunks."""
    wires = [request.encode() for request in requests]
    wires += [request.encode_chunked([b""]) for request in requests if request.body]
    assert asyncio.run(send_all(service, iter(wires))) == {200: len(wires)}


def test_mutated_requests_change_nothing(service: ServiceProcess, requests: list[SoundRequest]) -> None:
    """A few hundred of them."""
    send_mutants(service, requests, FAST_COUNT, seed=1)


@pytest.mark.slow
def test_very_many_mutated_requests_change_nothing(service: ServiceProcess, requests: list[SoundRequest]) -> None:
    """The same with others, and many more."""
    send_mutants(service, requests, SLOW_COUNT, seed=2)


def send_mutants(service: ServiceProcess, requests: list[SoundRequest], count: int, seed: int) -> None:
    """Send ``count`` mutants; require an answer to each, and after them the same processes, ready and no larger."""
    [worker] = service.worker_pids(0)
    mutants = mutated_requests(requests, count, seed)
    outcomes = asyncio.run(send_all(service, (next(mutants) for _ in range(WARM_UP))))
    before = resident_bytes(worker)
    outcomes += asyncio.run(send_all(service, mutants))
    print(outcomes)  # noqa: T201  # shown by pytest -rP
    assert outcomes.total() == count
    assert {200, 400, 408, 422} <= set(outcomes), "the mutants are all of one kind"
    health = httpx.get(f"{service.url}/health", timeout=PATIENCE_S)
    assert health.status_code == 200
    assert health.json()["queue_depth"] == 0
    assert service.worker_pids(0) == [worker]
    assert len(service.engine_pids) == 1
    assert resident_bytes(worker) - before < MAX_GROWTH_BYTES
    assert "Traceback" not in service.output


async def send_all(service: ServiceProcess, wires: Iterator[bytes]) -> Counter[int]:
    """Send each request over a connection of its own, some at a time; give how often each status came, 0 for none."""
    address = urlsplit(service.url)
    outcomes: Counter[int] = Counter()

    async def client() -> None:
        for wire in wires:
            async with asyncio.timeout(PATIENCE_S):
                status, answer = await exchange(str(address.hostname), int(address.port or 0), wire)
            assert status in ANSWERS or not answer, f"{wire!r} got {answer!r}"
            assert status < 400 or not SECRETS.search(answer), f"{wire!r} got {answer!r}"
            outcomes[status] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())
    return outcomes


async def exchange(host: str, port: int, wire: bytes) -> tuple[int, bytes]:
    """Send one request; give the status and the bytes of the answer, 0 and b"" for a connection closed without one."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(wire)
        status, head = 100, b""
        while 100 <= status < 200:  # an interim answer has another one behind it
            head = await reader.readuntil(b"\r\n\r\n")
            first = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
            assert first is not None, f"{wire!r} got {head!r}"
            status = int(first[1])
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)\r\n", head)
        has_body = length is not None and not wire.startswith(b"HEAD ")
        body = await reader.readexactly(int(length[1])) if has_body and length is not None else b""
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        partial = error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
        assert not partial, f"{wire!r} got the half of an answer, {partial!r}"
        return 0, b""
    else:
        return status, head + body
    finally:
        writer.transport.abort()
