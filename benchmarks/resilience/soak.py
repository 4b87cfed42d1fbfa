"""``python -m benchmarks.resilience.soak``: a million mixed requests, and what every process holds after them.

The exit status is 1 when a descriptor or a request is left over, a response was wrong, or a process grew by more than
``MAX_GROWTH_MIB`` or ``MAX_MORE_THREADS``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load.http_connection import HttpConnection, NoAnswer
from benchmarks.load.open_loop import percentile_ms
from benchmarks.load.uploads import FORM_TYPE, SAMPLES, form, http_request, photo
from benchmarks.servers.footprint import Footprint, footprint, peer_ports
from benchmarks.servers.server_process import exit_on_signals
from benchmarks.servers.service_process import ServiceProcess
from service.settings import DEFAULT_CHECKPOINT

MAX_GROWTH_MIB = 64.0
MAX_MORE_THREADS = 4  # a pool starts its threads when it first needs them
_CLIENTS = 16
_HANG_S = 60.0
_SETTLE_S = 60.0
_MAX_BODY_BYTES = 2**20


@dataclass(frozen=True)
class Kind:
    """One way to ask: ``share`` of all requests, the statuses that are right, and whether the client leaves at once."""

    share: float
    method: str
    path: str
    statuses: frozenset[int]
    body: bytes = b""
    content_type: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    leaves: bool = False


@dataclass
class Phase:
    """Some requests: how they ended by kind and status, what went wrong, and the seconds that plain predictions took."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)


@dataclass
class Soak:
    """``footprints`` by process and moment (start, middle, end); ``in_flight`` requests by the service's own count."""

    footprints: dict[str, list[Footprint]] = field(default_factory=dict)
    in_flight: list[float] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Say what was left over, grew, or went wrong."""
        found = [wrong for phase in self.phases for wrong in phase.wrong[:3]]
        for name, (start, *_, end) in self.footprints.items():
            if end.open_files > start.open_files:
                found.append(f"{name}: {end.open_files - start.open_files} open files are left over")
            if end.threads > start.threads + MAX_MORE_THREADS:
                found.append(f"{name}: {end.threads - start.threads} threads are left over")
            if end.resident_mib - start.resident_mib > MAX_GROWTH_MIB:
                found.append(f"{name}: grew by {end.resident_mib - start.resident_mib:.0f} MiB")
        if self.in_flight[-1] > self.in_flight[0]:
            found.append(f"{self.in_flight[-1] - self.in_flight[0]:.0f} requests never ended")
        return found


def main() -> int:
    """Run it, print the figures, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resilience.soak", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    exit_on_signals()
    began = time.monotonic()
    with soak_service(options.checkpoint, options.workers) as service:
        soak = asyncio.run(run_soak(service, options.requests, options.workers))
    print(as_markdown(soak, options.requests, time.monotonic() - began))
    failures = soak.failures()
    if failures:
        sys.stderr.write("".join(f"- {failure}\n" for failure in failures))
    return 1 if failures else 0


def soak_service(checkpoint: Path, workers: int) -> ServiceProcess:
    """Make the service that the mix is made for; it starts as a context manager."""
    return ServiceProcess(checkpoint, workers=workers, max_body_bytes=_MAX_BODY_BYTES, header_timeout_s=60)


async def run_soak(service: ServiceProcess, requests: int, workers: int) -> Soak:
    """Warm up with a tenth (at most 10,000) of ``requests``, look, send half of them, look, send the rest, look."""
    soak, rng, kinds = Soak(), random.Random(0), make_kinds()
    pids = {"supervisor": service.pid, "engine": service.engine_pids[-1]}
    pids |= {f"worker {index}": service.worker_pids(index)[-1] for index in range(workers)}
    await _send(service.url, kinds, rng, min(requests // 10, 10_000))
    await _look(service.url, pids, soak)
    for _ in range(2):
        soak.phases.append(await _send(service.url, kinds, rng, requests // 2))
        await _look(service.url, pids, soak)
    return soak


def make_kinds() -> dict[str, Kind]:
    """Make the mix: sizes from 2 kB to over the limit, every dialect, and every common way to go wrong."""
    images = [path.read_bytes() for path in SAMPLES]
    png, ok = images[0], frozenset({200})
    broken = frozenset({422})
    json_body = json.dumps({"inputs": base64.b64encode(png).decode()}).encode()
    return {
        "image as the body": Kind(40, "POST", "/predict", ok, png, "image/png"),
        "image in a form": Kind(14, "POST", "/predict", ok, form(png), FORM_TYPE),
        "image in JSON": Kind(8, "POST", "/predict", ok, json_body, "application/json"),
        "eight images in a form": Kind(8, "POST", "/predict/batch", ok, form(*images[:7], b"no image"), FORM_TYPE),
        "photo": Kind(2, "POST", "/predict", ok, photo(), "image/jpeg"),
        "Hugging Face": Kind(5, "POST", "/hf", ok, png, "image/png"),
        "truncated image": Kind(5, "POST", "/predict", broken, png[:-100], "image/png"),
        "empty body": Kind(2, "POST", "/predict", broken, b"", "image/png"),
        "text for an image": Kind(3, "POST", "/predict", frozenset({415}), b"hello", "text/plain"),
        "broken JSON": Kind(3, "POST", "/predict", frozenset({400}), b'{"inputs": ', "application/json"),
        "over the limit": Kind(0.5, "POST", "/predict", frozenset({413}), bytes(_MAX_BODY_BYTES + 1), "image/png"),
        "no such path": Kind(2, "GET", "/nothing", frozenset({404})),
        "health": Kind(2, "GET", "/health", ok),
        "metrics": Kind(0.2, "GET", "/metrics", ok),
        "deadline of 3 ms": Kind(2, "POST", "/predict", frozenset({200, 504}), png, "image/png", {"x-request-timeout-ms": "3"}),
        "leaves at once": Kind(3, "POST", "/predict", frozenset(), png, "image/png", leaves=True),
    }


def as_markdown(soak: Soak, requests: int, took_s: float) -> str:
    """Make the tables."""
    lines = [f"{requests:,} requests in {took_s:.0f} s.", "", "| process | memory in MiB | open files | threads |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, looks in soak.footprints.items():
        memory = ", ".join(f"{look.resident_mib:.1f}" for look in looks)
        files = ", ".join(str(look.open_files) for look in looks)
        threads = ", ".join(str(look.threads) for look in looks)
        lines.append(f"| {name} | {memory} | {files} | {threads} |")
    lines += ["", "Each at start, middle and end.", "", "| half | median | 99th percentile |", "| --- | ---: | ---: |"]
    for name, phase in zip(("first", "second"), soak.phases, strict=True):
        latencies = sorted(phase.latencies_s)
        lines.append(f"| {name} | {percentile_ms(latencies, 0.5):.1f} ms | {percentile_ms(latencies, 0.99):.1f} ms |")
    lines += ["", "| request | ended with | times |", "| --- | --- | ---: |"]
    outcomes = sum((phase.outcomes for phase in soak.phases), Counter())
    lines += [f"| {kind} | {end} | {count:,} |" for (kind, end), count in sorted(outcomes.items())]
    return "\n".join(lines)


async def _send(url: str, kinds: dict[str, Kind], rng: random.Random, count: int) -> Phase:
    phase = Phase()
    names = iter(rng.choices(list(kinds), [kind.share for kind in kinds.values()], k=count))
    await asyncio.gather(*(_client(url, kinds, names, phase) for _ in range(_CLIENTS)))
    return phase


async def _client(url: str, kinds: dict[str, Kind], names: Iterator[str], phase: Phase) -> None:
    connection: HttpConnection | None = None
    for name in names:
        kind = kinds[name]
        if connection is None or not connection.is_open:
            if connection is not None:
                await connection.close()
            connection = await HttpConnection.open(url)
        request_id = f"soak-{sum(phase.outcomes.values())}"
        headers = {"x-request-id": request_id, **kind.headers}
        request = http_request(kind.method, kind.path, kind.body, kind.content_type, headers)
        if kind.leaves:
            connection.send(request)
            await asyncio.sleep(0)
            connection.abort()
            phase.outcomes[name, "-"] += 1
            continue
        began = time.monotonic()
        try:
            answer = await connection.exchange(request, patience_s=_HANG_S)
        except NoAnswer as error:
            phase.outcomes[name, "lost"] += 1
            phase.wrong.append(f"{name}: {error}")
            continue
        phase.outcomes[name, str(answer.status)] += 1
        if answer.status not in kind.statuses or answer.headers.get("x-request-id") != request_id:
            phase.wrong.append(f"{name}: {answer.status} for {answer.headers.get('x-request-id')}, sent {request_id}")
        if name == "image as the body":
            phase.latencies_s.append(time.monotonic() - began)
    if connection is not None:
        await connection.close()


async def _look(url: str, pids: dict[str, int], soak: Soak) -> None:
    """Note what every process holds, once the workers have seen that all clients are gone."""
    connection = await HttpConnection.open(url)
    answer = await connection.exchange(http_request("GET", "/metrics"), patience_s=_HANG_S)
    await connection.close()
    soak.in_flight.append(float(re.findall(rb"^service_requests_in_flight (\S+)", answer.body, re.MULTILINE)[0]))
    limit = time.monotonic() + _SETTLE_S
    while any(peer_ports(pid) for pid in pids.values()) and time.monotonic() < limit:
        await asyncio.sleep(0.05)
    for name, pid in pids.items():
        soak.footprints.setdefault(name, []).append(footprint(pid))


if __name__ == "__main__":
    sys.exit(main())
