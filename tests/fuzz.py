"""``python -m tests.fuzz``: mutants of images, forms, JSON, tensors and HTTP to the real service, under watch.

For some minutes, a client sends mutants of sound requests over 16 connections. Another connection asks for ``/health/live``.
The exit status is 1 when a mutant gets an answer that the contract does not have, a process is started again, memory goes
over its budget, or health takes longer than ``HEALTH_S`` whenever the same requests are sent once more. Such requests are
saved.

    python -m tests.fuzz --minutes 5 --seed 1
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

from benchmarks.servers.footprint import group_resident_mb
from benchmarks.servers.server_process import exit_on_signals
from benchmarks.servers.service_process import ServiceProcess
from service.settings import DEFAULT_CHECKPOINT
from tests.support.image_file import encoded
from tests.support.mutated_requests import mutated_documents, mutated_requests, requests_of_mutated_images, sound_requests
from tests.support.seed_images import seed_images

HEALTH_S = 0.25
BUDGET_BYTES = 256 * 2**20  # the service's own setting
SLACK_MB = 160  # bodies under way, and what the allocator keeps
MOST_MINUTES = 60
CLIENTS = 16
_QUIET_S = 5.0
_REPLAYS = 3
_PATIENCE_S = 60.0
_BATCH = 200
_SAMPLES = sorted((Path(__file__).parent / "images").glob("*.png"))

# Every answer that a ready service may give; 500 is none, and 503 only for memory.
ANSWERS = {200, 307, 400, 404, 405, 408, 411, 413, 415, 417, 422, 429, 431, 504, 505}
_SECRETS = re.compile(rb"Traceback|Error\(|Exception|site-packages|\.py\b")


@dataclass
class Report:
    """``health_s`` has the slowest answer of health by what was sent; ``noise`` counts slow ones that did not come again."""

    outcomes: Counter[int] = field(default_factory=Counter)
    health_s: dict[str, float] = field(default_factory=dict)
    noise: int = 0
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
        self._address = urlsplit(service.url)
        self._folder = folder
        self.probe = HealthProbe(service)
        self.report = Report()
        self._under_way: list[tuple[bytes, float, float]] = []  # request, began, ended
        self.probe.start()

    def begin(self) -> None:
        """Forget how slow health was until now."""
        self.probe.slow.clear()
        self.probe.slowest_s = 0.0
        self._under_way.clear()

    async def send(self, wires: Iterator[bytes]) -> None:
        """Send each request over a connection of its own, ``CLIENTS`` at a time; check the answers."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(wires))

    async def find_slow(self) -> None:
        """Send what was under way when health was slow once more; what makes it slow again is a failure, the rest is noise."""
        slow, sent = self.probe.slow.copy(), self._under_way.copy()
        for began, ended in slow:
            suspects = [wire for wire, start, end in sent if start < ended and end > began]
            if not await self._is_slow(suspects):
                self.report.noise += 1
                continue
            while len(suspects) > 1:
                middle = len(suspects) // 2
                if await self._is_slow(suspects[:middle]):
                    suspects = suspects[:middle]
                elif await self._is_slow(suspects[middle:]):
                    suspects = suspects[middle:]
                else:
                    break
            self.fail(f"health took {ended - began:.2f} s", *suspects)

    async def _is_slow(self, wires: Sequence[bytes]) -> bool:
        for _ in range(_REPLAYS):
            self.begin()
            await self.send(iter(wires))
            if not self.probe.slow:
                return False
        return True

    def fail(self, why: str, *wires: bytes) -> None:
        """Record a failure and save its requests."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = []
        for wire in wires:
            path = self._folder / f"{sha256(wire).hexdigest()[:12]}.http"
            path.write_bytes(wire)
            names.append(str(path))
        self.report.failures.append(" ".join((why, *names)))

    async def _client(self, wires: Iterator[bytes]) -> None:
        for wire in wires:
            began = time.monotonic()
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    status, answer = await exchange(str(self._address.hostname), int(self._address.port or 80), wire)
            except (TimeoutError, OSError, AssertionError) as error:
                self.fail(f"{type(error).__name__} {str(error)[-200:]}", wire)
                continue
            self.report.outcomes[status] += 1
            self._under_way.append((wire, began, time.monotonic()))
            if why := what_is_wrong(status, answer):
                self.fail(why, wire)


async def exchange(host: str, port: int, wire: bytes) -> tuple[int, bytes]:
    """Send one request; return the status and the bytes of the answer, 0 and b"" for a connection closed without one."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(wire)
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
    if status == 503 and b'"memory_budget_exceeded"' in answer and b"\r\nretry-after: " in answer.lower():
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


def fuzz(checkpoint: Path, *, minutes: float, seed: int, folder: Path, replay: Sequence[bytes] = ()) -> Report:
    """Send mutants for so many ``minutes``, or ``replay`` three times; save what fails to ``folder``."""
    limits: dict[str, Any] = {"header_timeout_s": 0.5, "body_timeout_s": 0.5, "memory_budget_bytes": BUDGET_BYTES}
    with ServiceProcess(checkpoint, workers=1, **limits) as service:
        fuzzer = Fuzzer(service, folder)
        report = asyncio.run(_run(fuzzer, minutes, seed, replay))
        report.peak_mb = fuzzer.probe.peak_mb
        limit_mb = report.start_mb + BUDGET_BYTES / 1e6 + SLACK_MB
        if report.peak_mb > limit_mb:
            report.failures.append(f"memory went to {report.peak_mb:.0f} MB, more than {limit_mb:.0f}")
        if (len(service.engine_pids), len(service.worker_pids(0))) != (1, 1):
            report.failures.append("a process was started again")
        if "Traceback" in service.output:
            report.failures.append("there is a traceback in the log:\n" + service.output.partition("Traceback")[2][:2000])
        report.failures += fuzzer.probe.failures[:3]
    return report


async def _run(fuzzer: Fuzzer, minutes: float, seed: int, replay: Sequence[bytes]) -> Report:
    report = fuzzer.report
    sound = [request.encode() for request in sound_requests(_SAMPLES[0].read_bytes())]

    async def phase(name: str, wires: Iterator[bytes]) -> None:
        fuzzer.begin()
        await fuzzer.send(wires)
        report.health_s[name] = fuzzer.probe.slowest_s

    fuzzer.begin()
    await asyncio.sleep(_QUIET_S)
    report.health_s["nothing"] = fuzzer.probe.slowest_s
    await phase("sound requests", _until(time.monotonic() + _QUIET_S, itertools.cycle(sound)))
    report.outcomes.clear()
    report.start_mb = fuzzer.probe.peak_mb
    if replay:
        await phase("replayed requests", iter([*replay] * _REPLAYS))
        await fuzzer.find_slow()
        return report
    source = mutants(seed)
    end = time.monotonic() + min(minutes, MOST_MINUTES) * 60
    slowest_s = 0.0
    while time.monotonic() < end:
        await phase("mutants", _until(min(end, time.monotonic() + 10), source))
        slowest_s = max(slowest_s, report.health_s["mutants"])
        await fuzzer.find_slow()
    report.health_s["mutants"] = slowest_s
    return report


def _until(end: float, wires: Iterator[bytes]) -> Iterator[bytes]:
    for wire in wires:
        yield wire
        if time.monotonic() >= end:
            return


def main() -> int:
    """Fuzz, print what was seen, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help=f"at most {MOST_MINUTES}")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same mutants")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="folder for requests that fail")
    parser.add_argument("--replay", type=Path, nargs="+", default=[], metavar="FILE", help="send these requests instead")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    options = parser.parse_args()
    exit_on_signals()
    replay = [path.read_bytes() for path in options.replay]
    report = fuzz(options.checkpoint, minutes=options.minutes, seed=options.seed, folder=options.out, replay=replay)
    lines = [f"{report.outcomes.total():,} requests: {dict(sorted(report.outcomes.items()))} (0: closed without an answer)"]
    lines += [f"slowest /health/live while it got {name}: {seconds * 1e3:.0f} ms" for name, seconds in report.health_s.items()]
    lines += [f"slower than {HEALTH_S * 1e3:.0f} ms, but not again with the same requests: {report.noise}"]
    lines += [f"memory of all processes (PSS): {report.start_mb:.0f} MB at first, {report.peak_mb:.0f} MB at most"]
    lines += [f"FAILED: {failure}" for failure in report.failures]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
