"""The memory budget: refused past its limit, free again afterwards, and read from the container's limits."""

from __future__ import annotations

import asyncio
import gc
import gzip
import math
import socket
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from service.errors import MemoryBudgetExceeded, ServiceError
from service.observability.request_record import Scope
from service.web.body import _thread
from service.web.content_encoding import decompressed
from service.web.exchange import Exchange, Reply, handle
from service.web.memory_budget import MemoryBudget, memory_limit_bytes
from tests.support.patience import wait_until
from tests.support.resident_memory import resident_bytes
from tests.support.scripted_engine import ApplicationServer

HALF_SENT = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
MIB = 2**20


def test_the_limit_can_be_filled_and_no_more() -> None:
    """What does not fit is refused with a time to retry after, and takes nothing."""
    budget = MemoryBudget(100)
    budget.acquire(60)
    budget.acquire(40)
    with pytest.raises(MemoryBudgetExceeded) as caught:
        budget.acquire(1)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
    assert budget.used_bytes == 100
    budget.release(100)
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("line", "folder", "file"),
    [
        ("0::/pods/one", "pods/one", "memory.max"),
        ("0::/pods/one", "pods", "memory.max"),
        ("0::/elsewhere", "", "memory.max"),
        ("9:cpu,memory:/pod", "memory/pod", "memory.limit_in_bytes"),
    ],
)
def test_the_smallest_limit_binds(tmp_path: Path, line: str, folder: str, file: str) -> None:
    """The process's own cgroup or one above it, of version 2 or 1."""
    membership = tmp_path / "membership"
    membership.write_text(line + "\n")
    limited = tmp_path / "cgroup" / folder
    limited.mkdir(parents=True)
    assert memory_limit_bytes(tmp_path / "cgroup", membership) > 1_000_000
    (limited / file).write_text("1000000\n")
    assert memory_limit_bytes(tmp_path / "cgroup", membership) == 1_000_000
    (limited / file).write_text("max\n")
    assert memory_limit_bytes(tmp_path / "cgroup", membership) > 1_000_000


class _Nothing:
    """An entrance that is told of an exchange and does nothing."""

    max_body_bytes = MIB

    def __init__(self) -> None:
        self.memory = MemoryBudget(MIB)

    def open(self, exchange: Exchange) -> None:
        """See ``Entrance``."""

    route = open

    def close(self, exchange: Exchange, reply: Reply | None) -> None:
        """See ``Entrance``."""


@pytest.mark.parametrize("iterations", range(6))
def test_a_client_that_leaves_as_its_body_is_decompressed_leaves_no_memory_in_use(iterations: int) -> None:
    """At whichever iteration of the event loop between the thread's result and the handler."""

    async def decompress_and_leave() -> int:
        exchange = Exchange(Scope("POST", "/"), entrance := _Nothing(), 0, lambda exchange, reply: None)
        exchange.body, exchange.deadline = gzip.compress(bytes(MIB // 2)), math.inf
        exchange.open()
        handle(exchange, partial(decompressed, lambda exchange: None, b"gzip"))
        await asyncio.sleep(0)
        threaded = threading.Event()
        _thread.submit(threaded.set)
        threaded.wait(60)  # the event loop stands still: the result has come and is not looked at
        for _ in range(iterations):
            await asyncio.sleep(0)
        exchange.leave()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return entrance.memory.used_bytes

    assert asyncio.run(decompress_and_leave()) == 0


def test_bodies_under_way_count(image_paths: list[Path]) -> None:
    """What has no room is refused in the middle of its body, the others and small ones go on, and what ends frees its room."""
    half = HALF_SENT % 200_000 + bytes(100_000)
    with (
        ApplicationServer(memory_budget_bytes=1_100_000, max_body_bytes=1_000_000) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        with ExitStack() as stack:
            held = [stack.enter_context(socket.create_connection(server.address, timeout=60)) for _ in range(10)]
            for sock in held:
                sock.sendall(half)

            def one_more_status() -> int:
                return client.post("/predict", content=bytes(150_000), headers={"Content-Type": "image/png"}).status_code

            wait_until(lambda: one_more_status() == 503)
            with socket.create_connection(server.address, timeout=60) as sock:
                sock.sendall(HALF_SENT % 200_000 + bytes(150_000))
                head = sock.recv(65536)
                assert head.startswith(b"HTTP/1.1 503 ")
                assert b"retry-after: 1\r\n" in head
            assert client.post("/hf", content=image_paths[0].read_bytes()).status_code == 200
            held[0].sendall(bytes(100_000))
            assert held[0].recv(65536).startswith(b"HTTP/1.1 422 ")
        wait_until(lambda: one_more_status() == 422)


def test_a_request_that_waits_behind_another_gives_its_room_back() -> None:
    """Also where its connection ends before it was let in."""
    first = HALF_SENT % 17 + bytes(17)
    with (
        ApplicationServer(memory_budget_bytes=150_000, max_body_bytes=150_000) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        server.engine.answer = lambda images: None
        for ending in (b"", b"\x16\x03\x01 no request \r\n\r\n"):
            with socket.create_connection(server.address, timeout=60) as sock:
                sock.sendall(first + HALF_SENT % 90_000 + bytes(90_000) + ending)
                assert sock.recv(65536).startswith(b"HTTP/1.1 422 ")
        large = {"content": bytes(100_000), "headers": {"Content-Type": "image/png"}}
        wait_until(lambda: client.post("/predict", **large).status_code == 422)  # type: ignore[arg-type]


@pytest.mark.slow
def test_half_sent_uploads_do_not_fill_the_memory(checkpoint_path: Path) -> None:
    """120 of them send 2 MiB of 16 each; the worker holds the budget and what it holds anyway, and afterwards only that."""
    budget = 64 * MIB
    settings = {"workers": 1, "memory_budget_bytes": budget, "header_timeout_s": 600, "body_timeout_s": 600}
    with ServiceProcess(checkpoint_path, **settings) as service, ExitStack() as stack:  # type: ignore[arg-type]
        worker = service.worker_pids(0)[-1]
        before = resident_bytes(worker)
        refused = 0
        held = [stack.enter_context(service.connect()) for _ in range(120)]
        for sock in held:
            sock.sendall(HALF_SENT % (16 * MIB) + bytes(2 * MIB))
        for sock in held:
            sock.settimeout(0.05)
            try:
                refused += sock.recv(65536).startswith(b"HTTP/1.1 503 ")
            except TimeoutError:
                continue
        assert refused >= 120 - budget // (2 * MIB)
        assert resident_bytes(worker) - before < 1.25 * budget  # a bytearray has up to an eighth to spare
        assert httpx.get(f"{service.url}/health/live", timeout=30).status_code == 200
        stack.close()
        wait_until(lambda: resident_bytes(worker) - before < 8 * MIB)


def test_a_refused_body_is_free_without_the_garbage_collector() -> None:
    """An error's traceback holds the frames that it passed, and their variables the body and the error."""
    lists = b'{"inputs": [%b[]]}' % (600_000 * b"[],")
    damaged = b"BM" + bytes(200_000)
    with ApplicationServer() as server:
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for path, headers, body in (
                ("/predict", {"content-type": "application/json"}, lists),
                ("/hf", {"content-type": "application/json"}, lists),
                ("/v2/models/scripted/infer", {"content-type": "application/json"}, lists),
                ("/view", {"content-type": "image/bmp"}, damaged),
                ("/explain", {"content-type": "image/bmp", "content-encoding": "gzip"}, gzip.compress(damaged)),
            ):
                answer = httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=60)
                assert answer.is_client_error, answer.text
            gc.collect()
            assert [each for each in gc.garbage if isinstance(each, ServiceError)] == []
        finally:
            gc.set_debug(0)
            gc.enable()
            gc.garbage.clear()
