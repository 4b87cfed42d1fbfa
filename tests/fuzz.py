"""``python -m tests.fuzz``: mutants of images, forms, JSON, tensors and HTTP to the real service, under watch.

For some minutes, mutants of sound requests are sent over 16 connections. Another connection asks for ``/health/live``. The exit
status is 1 when an answer is not of the contract, a process is started again, memory goes over its budget, something is left
over afterwards, or a request keeps the event loop for longer than ``LOOP_S``. Such requests are saved. With ``--requests``
a mix of sound and common wrong requests is sent instead, and every answer must be the right one.

    python -m tests.fuzz --minutes 5 --seed 1
    python -m tests.fuzz --requests 1000000
    python -m tests.fuzz --replay fuzz-failures/*.http
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from benchmarks.load.uploads import form_request, http_request, photo
from benchmarks.servers.footprint import Footprint, footprint, group_resident_mb, peer_ports, thread_cpu_s
from benchmarks.servers.server_process import exit_on_signals
from benchmarks.servers.service_process import ServiceProcess
from service.settings import DEFAULT_CHECKPOINT
from tests.support.image_file import encoded
from tests.support.mutated_requests import mutated_documents, mutated_requests, requests_of_mutated_images, sound_requests
from tests.support.seed_images import seed_images

HEALTH_S = 0.25
LOOP_S = 0.1
BUDGET_BYTES = 256 * 2**20  # these two are the service's settings
MAX_BODY_BYTES = 4 * 2**20
SLACK_MB = 64  # what is not counted: small bodies, one body that is joined, inflated or parsed, codecs loaded, gaps in the heap
MOST_MINUTES = 60
CLIENTS = 16
_QUIET_S = 5.0  # before a look at the memory: what is free is returned meanwhile
_REPLAYS = 3
_PATIENCE_S = 60.0
_BATCH = 200
_WARM_UP = 1_000
_MORE_THREADS = 4  # a pool starts its threads when it first needs them
_SAMPLES = sorted((Path(__file__).parent / "images").glob("*.png"))
SOUND = [request.encode() for request in sound_requests(_SAMPLES[0].read_bytes())]

# Every answer that a ready service may give; 500 is none, and 503 only for memory.
ANSWERS = {200, 307, 400, 404, 405, 408, 411, 413, 415, 417, 422, 429, 431, 504, 505}
_SECRETS = re.compile(rb"Traceback|Error\(|Exception|site-packages|\.py\b")


Sent = tuple[bytes, frozenset[int] | None]
"""A request and the statuses that are right for it: None for all ``ANSWERS``, none of them for a client that leaves at once."""


@dataclass
class Report:
    """``health_s`` has the slowest answer of health by what was sent; ``slow`` counts those above ``HEALTH_S``.

    ``loop_s`` is the longest that a request which was under way then keeps the event loop; ``looks`` has what each process held
    before and after.
    """

    outcomes: Counter[int] = field(default_factory=Counter)
    health_s: dict[str, float] = field(default_factory=dict)
    looks: dict[str, list[Footprint]] = field(default_factory=dict)
    slow: int = 0
    loop_s: float = 0.0
    start_mb: float = 0.0
    peak_mb: float = 0.0
    failures: list[str] = field(default_factory=list)


class HealthProbe(threading.Thread):
    """Asks for ``/health/live`` over one connection; ``slow`` has begin and end of each answer above ``HEALTH_S``."""

    def __init__(self, service: ServiceProcess) -> None:
        super().__init__(daemon=True)
        self._service = service
        self.slowest_s = self.peak_mb = 0.0
        self.slow: list[tuple[float, float]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        """Ask fifty times a second; look at the memory of all processes once a second."""
        address = urlsplit(self._service.url)
        connection = http.client.HTTPConnection(str(address.hostname), int(address.port or 80), timeout=_PATIENCE_S)
        for count in itertools.count():
            began = time.monotonic()
            try:
                connection.request("GET", "/health/live")
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.failures.append(f"/health/live was {answer.status}")
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"/health/live: {error!r}")
                connection.close()
            ended = time.monotonic()
            self.slowest_s = max(self.slowest_s, ended - began)
            if ended - began > HEALTH_S:
                self.slow.append((began, ended))
            if count % 50 == 0:
                self.peak_mb = max(self.peak_mb, group_resident_mb(self._service.pid))
            time.sleep(0.02)


class Fuzzer:
    """Sends requests to ``service`` and saves those that fail to ``folder``."""

    def __init__(self, service: ServiceProcess, folder: Path) -> None:
        self._service = service
        self._address = urlsplit(service.url)
        self._folder = folder
        self.probe = HealthProbe(service)
        self.report = Report()
        self._under_way: list[tuple[bytes, float, float]] = []  # request, began, ended
        self.probe.start()

    async def send(self, requests: Iterator[Sent]) -> float:
        """Send each over a connection of its own, ``CLIENTS`` at a time; check the answers; return the slowest health."""
        self.probe.slow.clear()
        self.probe.slowest_s = 0.0
        self._under_way.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(requests))
        return self.probe.slowest_s

    async def find_slow(self) -> None:
        """Send each request that was under way when health was slow alone; who keeps the event loop long is a failure.

        That is told by the processor time of the worker's main thread, which other programs on the machine do not change.
        """
        slow, sent = self.probe.slow.copy(), self._under_way.copy()
        suspects = {wire for wire, start, end in sent if any(start < ended and end > began for began, ended in slow)}
        took_s = {wire: await self._loop_s(wire) for wire in sorted(suspects)}
        for wire, seconds in took_s.items():
            if seconds > LOOP_S:
                self.fail(f"{seconds:.2f} s on the event loop", wire)
        self.report.slow += len(slow)
        self.report.loop_s = max(self.report.loop_s, *took_s.values(), 0.0)

    async def _loop_s(self, wire: bytes) -> float:
        pid = self._service.worker_pids(0)[-1]
        before = thread_cpu_s(self._service.pid)[pid, pid]
        await self.send(iter([(wire, None)]))
        return thread_cpu_s(self._service.pid)[pid, pid] - before

    async def look(self) -> None:
        """Note what every process holds, once the worker has seen that all clients but the probe are gone."""
        service = self._service
        pids = {"supervisor": service.pid, "engine": service.engine_pids[-1], "worker": service.worker_pids(0)[-1]}
        await asyncio.sleep(_QUIET_S)
        limit = time.monotonic() + _PATIENCE_S
        while len(peer_ports(pids["worker"])) > 1 and time.monotonic() < limit:
            await asyncio.sleep(0.05)
        for name, pid in pids.items():
            self.report.looks.setdefault(name, []).append(footprint(pid))

    def fail(self, why: str, *wires: bytes) -> None:
        """Record a failure and save its requests."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = []
        for wire in wires:
            path = self._folder / f"{sha256(wire).hexdigest()[:12]}.http"
            path.write_bytes(wire)
            names.append(str(path))
        self.report.failures.append(" ".join((why, *names)))

    async def _client(self, requests: Iterator[Sent]) -> None:
        host, port = str(self._address.hostname), int(self._address.port or 80)
        for wire, right in requests:
            began = time.monotonic()
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    status, answer = await exchange(host, port, wire, leaves=right == frozenset())
            except (TimeoutError, OSError, AssertionError) as error:
                self.fail(f"{type(error).__name__} {str(error)[-200:]}", wire)
                continue
            self.report.outcomes[status] += 1
            self._under_way.append((wire, began, time.monotonic()))
            why = what_is_wrong(status, answer)
            if why or (right and status not in right):
                self.fail(why or f"status {status} where {set(right or ())} is right", wire)


async def exchange(host: str, port: int, wire: bytes, *, leaves: bool = False) -> tuple[int, bytes]:
    """Send one request; return the status and the bytes of the answer, 0 and b"" for a connection closed without one."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(wire)
        if leaves:
            await writer.drain()
            return 0, b""
        status, head = 100, b""
        while 100 <= status < 200:  # an interim answer has another one behind it
            head = await reader.readuntil(b"\r\n\r\n")
            first = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
            assert first is not None, f"half an answer: {head!r}"
            status = int(first[1])
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)\r\n", head)
        has_body = length is not None and not wire.startswith(b"HEAD ")
        body = await reader.readexactly(int(length[1])) if has_body and length is not None else b""
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        partial = error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
        assert not partial, f"half an answer: {partial!r}"
        return 0, b""
    else:
        return status, head + body
    finally:
        writer.transport.abort()


def what_is_wrong(status: int, answer: bytes) -> str:
    """Say why an answer to a mutant is not of the contract; empty where it is."""
    if status >= 400 and _SECRETS.search(answer):
        return f"status {status} with inner words: {answer[-300:]!r}"
    if status == 503 and b"no memory left" in answer and b"\r\nretry-after: " in answer.lower():
        return ""
    return "" if status in ANSWERS or not answer else f"status {status}: {answer[-300:]!r}"


def mutants(seed: int) -> Iterator[bytes]:
    """Return mutants without end: a third of images, a third of bodies, headers and framing, a third of JSON."""
    images = seed_images(_SAMPLES)
    with Image.open(_SAMPLES[0]) as sample:
        large = sample.convert("RGB").resize((1200, 900))
    options: dict[str, dict[str, Any]] = {"JPEG": {"progressive": True}, "AVIF": {"speed": 10}, "PNG": {"compress_level": 1}}
    images += [encoded(large, kind, **options.get(kind, {})) for kind in ("JPEG", "PNG", "WebP", "GIF", "AVIF", "HEIC", "BMP")]
    sound = sound_requests(_SAMPLES[0].read_bytes())
    for number in itertools.count(seed * 1_000_000):
        yield from _shuffled(
            number,
            requests_of_mutated_images(images, _BATCH, number),
            mutated_requests(sound, _BATCH, number, swollen=0.03),
            mutated_documents(sound, _BATCH, number),
        )


def _shuffled(seed: int, *sources: Iterator[bytes]) -> Iterator[bytes]:
    order = random.Random(seed)
    left = list(sources)
    while left:
        source = order.choice(left)
        wire = next(source, None)
        if wire is None:
            left.remove(source)
        else:
            yield wire


def sound_mix(seed: int) -> Iterator[Sent]:
    """Return requests without end: sizes from 2 kB to over the limit, every dialect, and every common way to go wrong."""
    png = _SAMPLES[0].read_bytes()
    images = [path.read_bytes() for path in _SAMPLES[:7]]
    broken_json = http_request("POST", "/predict", b'{"inputs": ', "application/json")
    late = http_request("POST", "/predict", png, "image/png", {"x-request-timeout-ms": "3"})
    kinds: list[tuple[float, bytes, set[int]]] = [
        *((40 / len(images), http_request("POST", "/predict", image, "image/png"), {200}) for image in images),
        *((2, wire, {200, 429, 504} if b" /explain" in wire else {200}) for wire in SOUND),  # explanations come last
        (8, form_request("/predict/batch", *images, b"no image"), {200}),
        (2, http_request("POST", "/predict", photo(), "image/jpeg"), {200}),
        (5, http_request("POST", "/predict", png[:-100], "image/png"), {422}),
        (2, http_request("POST", "/predict", b"", "image/png"), {422}),
        (3, http_request("POST", "/predict", b"hello", "text/plain"), {415}),
        (3, broken_json, {400}),
        (0.5, http_request("POST", "/predict", bytes(MAX_BODY_BYTES + 1), "image/png"), {413}),
        (2, http_request("GET", "/nothing"), {404}),
        (2, late, {200, 504}),
        (3, http_request("POST", "/predict", png, "image/png"), set()),
    ]
    order = random.Random(seed)
    while True:
        for _, wire, right in order.choices(kinds, [share for share, _, _ in kinds], k=_BATCH):
            yield wire, frozenset(right)


def fuzz(
    checkpoint: Path, *, minutes: float = 0, requests: int = 0, seed: int = 1, folder: Path, replay: Sequence[bytes] = ()
) -> Report:
    """Send mutants for so many ``minutes``, so many sound ``requests``, or ``replay``; save what fails to ``folder``."""
    limits: dict[str, Any] = {"header_timeout_s": 0.5, "body_timeout_s": 0.5, "memory_budget_bytes": BUDGET_BYTES}
    with ServiceProcess(checkpoint, workers=1, max_body_bytes=MAX_BODY_BYTES, **limits) as service:
        fuzzer = Fuzzer(service, folder)
        asyncio.run(_run(fuzzer, minutes, requests, seed, replay))
        report = fuzzer.report
        report.peak_mb = fuzzer.probe.peak_mb
        limit_mb = report.start_mb + BUDGET_BYTES / 1e6 + SLACK_MB
        if report.peak_mb > limit_mb:
            report.failures.append(f"memory went to {report.peak_mb:.0f} MB, more than {limit_mb:.0f}")
        for name, (start, end) in report.looks.items():
            if end.open_files > start.open_files or end.threads > start.threads + _MORE_THREADS:
                report.failures.append(f"{name}: something is left over: {start}, then {end}")
            if end.resident_mib - start.resident_mib > SLACK_MB:
                report.failures.append(f"{name}: grew from {start.resident_mib:.0f} to {end.resident_mib:.0f} MiB")
        if (len(service.engine_pids), len(service.worker_pids(0))) != (1, 1):
            report.failures.append("a process was started again")
        if "Traceback" in service.output:
            report.failures.append("there is a traceback in the log:\n" + service.output.partition("Traceback")[2][:2000])
        report.failures += fuzzer.probe.failures[:3]
    return report


async def _run(fuzzer: Fuzzer, minutes: float, requests: int, seed: int, replay: Sequence[bytes]) -> None:
    report, slowest = fuzzer.report, fuzzer.report.health_s
    mix = sound_mix(seed)
    slowest["nothing"] = await fuzzer.send(iter(()))
    await asyncio.sleep(_QUIET_S)
    slowest["nothing"] = fuzzer.probe.slowest_s
    warm_up = itertools.islice(mix, max(_WARM_UP, requests // 10))
    slowest["sound requests"] = await fuzzer.send(warm_up if requests else ((wire, right and None) for wire, right in warm_up))
    await fuzzer.look()
    report.outcomes.clear()
    report.start_mb = fuzzer.probe.peak_mb
    if requests:
        slowest["more of them"] = await fuzzer.send(itertools.islice(mix, requests))
    if replay:
        slowest["replayed requests"] = await fuzzer.send((wire, None) for wire in [*replay] * _REPLAYS)
        await fuzzer.find_slow()
    source, end = mutants(seed), time.monotonic() + min(minutes, MOST_MINUTES) * 60
    while time.monotonic() < end:
        slow_s = await fuzzer.send((wire, None) for wire in itertools.islice(source, 5 * _BATCH))
        slowest["mutants"] = max(slowest.get("mutants", 0.0), slow_s)
        await fuzzer.find_slow()
    await fuzzer.look()


def main() -> int:
    """Fuzz, print what was seen, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.0, help=f"of mutants, at most {MOST_MINUTES}")
    parser.add_argument("--requests", type=int, default=0, help="how many sound requests to send")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same requests")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="folder for requests that fail")
    parser.add_argument("--replay", type=Path, nargs="+", default=[], metavar="FILE", help="send these requests again")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    options = parser.parse_args()
    exit_on_signals()
    report = fuzz(
        options.checkpoint,
        minutes=options.minutes,
        requests=options.requests,
        seed=options.seed,
        folder=options.out,
        replay=[path.read_bytes() for path in options.replay],
    )
    lines = [f"{report.outcomes.total():,} requests: {dict(sorted(report.outcomes.items()))} (0: closed without an answer)"]
    lines += [f"slowest /health/live while it got {name}: {seconds * 1e3:.0f} ms" for name, seconds in report.health_s.items()]
    lines += [f"{report.slow} took longer than {HEALTH_S * 1e3:.0f} ms, which others on this machine may have caused;"]
    lines += [f"no request that was under way then kept the event loop for longer than {report.loop_s * 1e3:.0f} ms by itself"]
    lines += [f"memory of all processes (PSS): {report.start_mb:.0f} MB at first, {report.peak_mb:.0f} MB at most"]
    lines += [f"{name}: {start}, then {end}" for name, (start, end) in report.looks.items()]
    lines += [f"FAILED: {failure}" for failure in report.failures]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
