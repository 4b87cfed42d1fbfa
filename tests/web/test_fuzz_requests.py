"""Mutated requests to the real service: each gets an answer in words or a closed connection, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from tests.fuzz import exchange, fuzz, what_is_wrong
from tests.support.mutated_requests import SoundRequest, mutated_requests, sound_requests
from tests.support.resident_memory import resident_bytes

FAST_COUNT = 500
CLIENTS = 32
WARM_UP = 200
MAX_GROWTH_BYTES = 96 * 2**20  # bodies of up to 16 MiB are read whole, and the allocator keeps some of it
PATIENCE_S = 120.0  # no expectation of speed: only the end of a test that would hang


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
def test_a_minute_of_mutants_changes_nothing(checkpoint_path: Path, tmp_path: Path) -> None:
    """What ``make fuzz`` does: mutants of images, bodies, JSON and HTTP at once, under watch."""
    assert fuzz(checkpoint_path, minutes=1, seed=2, folder=tmp_path).failures == []


@pytest.mark.slow
def test_thousands_of_mixed_requests_leave_nothing_behind(checkpoint_path: Path, tmp_path: Path) -> None:
    """Every answer is the right one, and afterwards no process has more open files, threads or much more memory."""
    assert fuzz(checkpoint_path, requests=4_000, folder=tmp_path).failures == []


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
            assert not what_is_wrong(status, answer), f"{wire!r} got {answer!r}"
            outcomes[status] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())
    return outcomes
