"""The targets of the service: how each is measured, and its bound."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu import measure_gpu
from benchmarks.load.http_connection import HttpConnection
from benchmarks.load.open_loop import run_open_loop
from benchmarks.load.uploads import UPLOADS, form_request, photo, pixels_request, small_jpegs
from benchmarks.parts import BATCH_SIZES, decode_rate, model_rates
from benchmarks.queueing import Parts, batch_size, predict_rate
from benchmarks.report import Page
from benchmarks.request_shares import HEAD as SHARES
from benchmarks.request_shares import shares_row
from benchmarks.resilience.faults import save_another
from benchmarks.servers.footprint import group_resident_mb
from benchmarks.servers.servers import FORM_ONLY, RIVALS, start_server
from benchmarks.taking_turns import HEAD, Contender, open_contender, run_rounds, table_rows, take_turn
from benchmarks.worker_part import measure_in_process
from service.cpu import available_cores
from service.model.checkpoint import load_checkpoint

CONNECTIONS = (1, 16, 64, 256)
_KINDS = {"small": "32x32 JPEG", "photo": "640x480 JPEG", "large": "12-megapixel JPEG"}
_PRODUCTION = ",SERVICE_ACCESS_LOG=true,SERVICE_API_KEYS=secret,SERVICE_CORS_ORIGINS=*"
_SETTINGS = {"default": "ours", "production": f"ours{_PRODUCTION}"}
_HEADERS = {"X-API-Key": "secret", "Origin": "https://example.org"}


@dataclass
class Run:
    """One run over all targets; later parts use what earlier ones measured."""

    page: Page
    checkpoint: Path
    rounds: int
    seconds: float  # of each turn
    parts: dict[str, Parts] = field(default_factory=dict)
    best: dict[tuple[str, str], float] = field(default_factory=dict)  # requests/s by upload and settings

    def everything(self, only: str = "") -> None:
        """Measure every part whose name matches ``only``; the page is written after each."""
        parts = {f"{kind} beside mosec": lambda upload=upload: self.rates(upload) for upload, kind in _KINDS.items()} | {
            "parts of a request": self.measure_parts,
            "share of what the parts allow": self.shares,
            "a worker's own time": self.worker,
            "batches": self.batches,
            "start and memory": self.memory,
            "open loop": self.open_loop,
            "where the time goes": self.profile,
            "more cores": self.scaling,
        }
        for name in filter(re.compile(only).search, parts):
            with self.page.part(name):
                parts[name]()
        if torch.cuda.is_available():
            with self.page.part("GPU"):
                measure_gpu(self.page, self.checkpoint, self.seconds)

    def rates(self, upload: str) -> None:
        """Load this service and mosec in turns."""
        contenders = compare(upload, self.checkpoint, list(_SETTINGS.values()), self.rounds, self.seconds)
        rival, cores, loads = contenders[0].name in RIVALS, available_cores(), " · ".join(map(str, CONNECTIONS))
        for settings, ours in zip(_SETTINGS, contenders[rival:], strict=True):
            name, ours.name = f"{_KINDS[upload]}, {settings}", f"ours, {settings}"
            self.best[upload, settings] = max(ours.median(c, lambda turn: turn.rate) for c in CONNECTIONS)
            ratios = [median(ours.ratios_to(contenders[0], c)) for c in CONNECTIONS]
            figure = " · ".join(f"{ratio:.2f}" for ratio in ratios) if rival else "not measured: mosec did not start"
            met = min(ratios) >= 1 and ratios[1] >= 1.5 if rival else None
            self.page.target(f"{name}: at {loads} connections 1 · 1.5 · 1 · 1 times mosec's rate", figure, met=met)
            p50, p99 = (ours.median(64, read) for read in (lambda turn: turn.load.p50_ms, lambda turn: turn.load.p99_ms))
            figure = f"{p99:.1f} ms, p50 {p50:.1f} ms"
            self.page.target(f"{name}: p99 at most 1.2 times p50 + 20 ms at 64", figure, met=0 < p99 <= 1.2 * p50 + 20)
            used = ours.median(256, lambda turn: turn.cores)
            self.page.target(f"{name}: 0.95 of the cores in use at 256", f"{used:.2f} of {cores}", met=used >= 0.95 * cores)
        self.page.table(f"{_KINDS[upload]}, in turns, medians of the rounds", HEAD, table_rows(contenders, CONNECTIONS))

    def measure_parts(self) -> None:
        """Time decoding, the model and HTTP, each with every core busy."""
        checkpoint, cores = load_checkpoint(self.checkpoint), available_cores()
        images = {kind: UPLOADS[kind]() for kind in _KINDS}
        spec, rate = checkpoint.metadata.input, partial(decode_rate, processes=cores, seconds=self.seconds)
        decode_s = {upload: cores / rate(images[upload][0], spec) for upload in _KINDS}  # first: it forks
        model, on_cores = model_rates(checkpoint, seconds=self.seconds / 3)
        rows = [[f"model, an image of a batch of {batch}", f"{cores / model[batch] * 1e6:,.0f} µs"] for batch in BATCH_SIZES]
        for upload, kind in _KINDS.items():
            with contextlib.ExitStack() as stack:
                turn = take_turn(open_contender(stack, FORM_ONLY, self.checkpoint, images[upload], {}), 64, self.seconds)
            http_s = (turn.server_cpu_s + turn.load_cpu_s) / max(1, turn.load.requests)
            parts = self.parts[upload] = Parts(decode_s[upload], http_s, model, on_cores, cores)
            rows += [[f"{kind}: decoding", f"{parts.decode_s * 1e6:,.0f} µs"]]
            rows += [[f"{kind}: {FORM_ONLY}, and wrk", f"{http_s * 1e6:,.0f} µs"]]
            rows += [[f"{kind}: all parts allow", f"{parts.allowed_per_s():,.0f} requests/s"]]
        self.page.table("Parts of a request by themselves, all cores busy, time of one core", ["part", "time"], rows)

    def shares(self) -> None:
        """Compare the best rates with what the parts allow."""
        for (upload, settings), rate in self.best.items():
            parts = self.parts[upload]
            allowed, least, what = parts.allowed_per_s(), 0.85, "the parts allow"
            if upload == "large":
                allowed, least, what = parts.cores / parts.decode_s, 0.95, "decoding alone allows"
            elif settings == "production" or upload == "photo":
                least = 0.8 if settings == "production" else 0.9
            figure, met = f"{rate / allowed:.2f} of {allowed:,.0f}/s", rate >= least * allowed
            self.page.target(f"{_KINDS[upload]}, {settings}: at least {least} of what {what}", figure, met=met)

    def worker(self) -> None:
        """Time a worker by itself, with 64 requests at once."""
        headers = ["--header", *(f"{name}:{value}" for name, value in _HEADERS.items())]
        arguments = ["--one", "--together", "64", "--requests", str(int(6_000 * self.seconds)), *headers]
        for settings, suffix in (("default", ""), ("production", _PRODUCTION)):
            middle, low = zip(*(measure_in_process(f".{suffix}", arguments) for _ in range(3)), strict=True)
            figure = f"{median(middle):.1f} µs, lowest tenth {min(low):.1f}"
            name = f"A worker's own time for a request at 64, {settings}: at most 45 µs"
            self.page.target(name, figure, met=median(middle) <= 45)

    def batches(self) -> None:
        """Load with requests of several images."""
        parts, model = self.parts["photo"], load_checkpoint(self.checkpoint).metadata.name
        own, photos, pixels = parts.model[BATCH_SIZES[-1]], "8 photographs a batch request", "/v2 with 64 images of pixels"
        loads = {photos: (8, form_request("/predict/batch", *[photo()] * 8)), pixels: (64, pixels_request(model, 64))}
        with start_server("ours", self.checkpoint) as server:
            for name, (images, request) in loads.items():
                contender = Contender(name, server, [request])
                run_rounds([contender], 8, self.rounds, self.seconds)
                rate = images * contender.median(8, lambda turn: turn.rate)
                figure = f"{rate:,.0f} images/s, {rate / own:.2f} of {own:,.0f}"
                figure += f"; with decoding {parts.allowed_per_s():,.0f} are possible" if name == photos else ""
                self.page.target(f"{name}: at least 0.9 of the model's own rate", figure, met=rate >= 0.9 * own)

    def memory(self) -> None:
        """Time the start, and read the memory then and after ten other checkpoints."""
        with tempfile.TemporaryDirectory() as folder:
            path, starts = Path(folder) / "model.safetensors", []
            shutil.copy(self.checkpoint, path)
            for _ in range(3):
                with start_server("ours", path, {"SERVICE_LOG_FORMAT": "text"}) as server:
                    starts.append(server.ready_s)
                    if len(starts) < 3:
                        continue
                    time.sleep(self.seconds)
                    memory_mb = {"start": group_resident_mb(server.pid)}
                    for number in range(1, 11):
                        save_another(path)
                        server.send_signal(signal.SIGHUP)
                        server.wait_for_output("outcome=loaded", number)
                    time.sleep(self.seconds)
                    memory_mb["ten reloads"] = group_resident_mb(server.pid)
        self.page.target("Ready within 2 s of the start", f"{median(starts):.2f} s", met=median(starts) <= 2)
        for when, held_mb in memory_mb.items():
            self.page.target(f"At most 400 MB (PSS) after {when}", f"{held_mb:.0f} MB", met=held_mb <= 400)

    def open_loop(self) -> None:
        """Compare random arrivals at a tenth of the best rate with lone requests of the same client."""
        requests, rate = [form_request("/predict", image) for image in small_jpegs()], self.best["small", "default"] / 10
        with start_server("ours", self.checkpoint) as server:
            alone, paused = (asyncio.run(_lone(server.url, requests, 2 * self.seconds, pause_s)) for pause_s in (0, 1 / rate))
            random = asyncio.run(run_open_loop(server.url, requests, rate_per_s=rate, duration_s=2 * self.seconds))
        p50_ms, paused_ms, alone_ms = (median(took_s) * 1e3 for took_s in (random, paused, alone))
        figure = f"{p50_ms:.2f} ms at {rate:,.0f}/s, {p50_ms / alone_ms:.2f} of {alone_ms:.2f} ms"
        figure += f"; lone after pauses {paused_ms:.2f} ms"
        name = "Open loop at a tenth of capacity: p50 at most 1.3 of a lone request's"
        self.page.target(name, figure, met=p50_ms <= 1.3 * alone_ms)

    def profile(self) -> None:
        """Divide the processor time of a request among the service's threads."""
        with start_server("ours", self.checkpoint) as server:
            rows = []
            for upload, kind in _KINDS.items():
                requests = [form_request("/predict", image) for image in UPLOADS[upload]()]
                rows.append([kind, *shares_row(server, requests, 64, self.seconds)])
        self.page.table("Where the processor time of a request goes", ["upload", *SHARES], rows)

    def scaling(self) -> None:
        """Measure on 1, 2, 4 ... cores and compare with the queueing model, which has seen one core at 64 connections."""
        most, rows, worst = available_cores(), [], 0.0
        rest_s: dict[str, float] = {}
        for cores in sorted({most, *(2**power for power in range(most.bit_length()))}):
            for upload in ("small", "photo"):
                parts, cells = self.parts[upload], []
                with _on_cores(cores), contextlib.ExitStack() as stack:
                    ours = open_contender(stack, "ours", self.checkpoint, UPLOADS[upload](), {})
                    for c in (64, 16, 256):
                        run_rounds([ours], c, 1, self.seconds)
                        turn, batch = ours.turns[c][0], batch_size(c, cores)
                        if upload not in rest_s:
                            rest_s[upload] = turn.cores / turn.rate - sum(needed_s for needed_s, _ in parts.stations(batch, 1))
                        off = turn.rate / predict_rate(parts.stations(batch, cores, rest_s[upload]), c) - 1
                        cells.append(f"{turn.rate:,.0f} ({off:+.0%})")
                        worst = max(worst, abs(off))
                rows.append([str(cores), _KINDS[upload], f"{rest_s[upload] * 1e6:,.0f} µs", *cells])
        head = ["cores", "upload", "time beside the parts", "64 connections", "16 connections", "256 connections"]
        self.page.table("Requests/s on so many cores, and how far they are from the queueing model", head, rows)
        name = f"1 to {most} cores: a queueing model predicts the rate within 15 %"
        self.page.target(name, f"{worst:.0%}", met=worst <= 0.15)


def compare(upload: str, checkpoint: Path, names: list[str], rounds: int, seconds: float) -> list[Contender]:
    """Load the best configuration of mosec, where one starts, and the servers of these names in turns."""
    images = UPLOADS[upload]()
    rates = {name: rate for name in RIVALS if (rate := _trial(name, checkpoint, images, seconds / 3))}
    with contextlib.ExitStack() as stack:
        names = [*sorted(rates, key=rates.__getitem__)[-1:], *names]
        contenders = [open_contender(stack, name, checkpoint, images, _HEADERS) for name in names]
        for connections in CONNECTIONS:
            longer = 2 if upload == "large" and connections >= 64 else 1  # a request waits for up to 2 s
            run_rounds(contenders, connections, rounds, seconds * longer)
    return contenders


def _trial(name: str, checkpoint: Path, images: list[bytes], seconds: float) -> float:
    """Return the product of the rates at 16 and 64 connections; 0 where the server does not start."""
    try:
        with contextlib.ExitStack() as stack:
            contender = open_contender(stack, name, checkpoint, images, {})
            return take_turn(contender, 16, seconds).rate * take_turn(contender, 64, seconds).rate
    except (AssertionError, OSError):
        return 0.0


async def _lone(url: str, requests: list[bytes], seconds: float, pause_s: float) -> list[float]:
    """Seconds of one request after the other."""
    connection = await HttpConnection.open(url)
    took_s: list[float] = []
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        await asyncio.sleep(pause_s)
        began = time.monotonic()
        await connection.exchange(requests[len(took_s) % len(requests)], patience_s=30)
        took_s.append(time.monotonic() - began)
    await connection.close()
    return took_s


@contextlib.contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """Have this process, and what it starts, use so many of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
