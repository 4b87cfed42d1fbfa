"""``python -m benchmarks``: every server under the same load on this machine, in one run; tables and JSON."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.load.closed_loop import LoadResult, run_wrk
from benchmarks.load.open_loop import run_open_loop
from benchmarks.load.uploads import form_request, large_photo, raw_request, small_jpegs
from benchmarks.parts import time_model
from benchmarks.report import Report, ServerFigures
from benchmarks.servers.footprint import group_cpu_s, group_resident_mb
from benchmarks.servers.machine import describe_machine
from benchmarks.servers.server_process import ServerProcess, exit_on_signals
from benchmarks.servers.servers import SERVERS, start_server
from service.cpu import available_cores
from service.model.checkpoint import load_checkpoint
from service.settings import DEFAULT_CHECKPOINT

CONNECTIONS = (1, 16, 64, 256)
OFFERED_SHARES = (0.1, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0, 1.2)


def main() -> int:
    """Run what was asked for and write the report; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--seconds", type=int, default=6, help="of each load, after as long a third of warm-up")
    parser.add_argument(
        "--servers", nargs="*", default=list(SERVERS), choices=list(SERVERS), metavar="NAME", help=", ".join(SERVERS)
    )
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True, help="the model alone")
    parser.add_argument("--open-loop", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--photos", action=argparse.BooleanOptionalAction, default=True, help="12-megapixel JPEGs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    exit_on_signals()
    images = small_jpegs()
    report = Report(describe_machine())
    if options.parts:
        measure_parts(report, options.checkpoint)
    for name in options.servers:
        with start_server(name, options.checkpoint) as server:
            measure_server(report, name, server, images, options.seconds)
            if name == "ours":
                best = max(result.requests_per_s for result in report.servers[name].loads)
                if options.open_loop:
                    measure_open_loop(report, server, images, best, options.seconds)
                if options.photos:
                    measure_photos(report, server, images, options.seconds)
    report.write(options.out)
    sys.stdout.write(report.as_markdown())
    return 0


def measure_parts(report: Report, path: Path) -> None:
    """The model on one core and on all."""
    checkpoint = load_checkpoint(path)
    for runtime, precision in (("openvino", "int8"), ("openvino", "bf16"), ("openvino", "fp32")):
        for threads in dict.fromkeys((1, available_cores())):
            name = f"{runtime} {precision}, {threads} thread{'s' if threads > 1 else ''}"
            report.model[name] = time_model(checkpoint, runtime=runtime, precision=precision, threads=threads)


def measure_server(report: Report, name: str, server: ServerProcess, images: list[bytes], seconds: int) -> None:
    """Each number of connections in turn, with the processor time that the server took for it."""
    kind = SERVERS[name]
    make = raw_request if kind.raw_body else form_request
    requests = [make(kind.path, image) for image in images]
    figures = ServerFigures(server.ready_s)
    for connections in CONNECTIONS:
        run_wrk(server.url, requests, connections=connections, duration_s=max(2, seconds // 3))
        before = group_cpu_s(server.pid)
        result = run_wrk(server.url, requests, connections=connections, duration_s=seconds)
        figures.loads.append(result)
        figures.cpu_ms.append((group_cpu_s(server.pid) - before) / result.requests * 1e3)
    figures.resident_mb = group_resident_mb(server.pid)
    report.servers[name] = figures


def measure_open_loop(report: Report, server: ServerProcess, images: list[bytes], best: float, seconds: int) -> None:
    """Poisson arrivals at shares of the best closed-loop rate."""
    requests = [form_request("/predict", image) for image in images]
    for share in OFFERED_SHARES:
        result = asyncio.run(run_open_loop(server.url, requests, rate_per_s=share * best, duration_s=seconds))
        report.open_loop.append(result)


def measure_photos(report: Report, server: ServerProcess, images: list[bytes], seconds: int) -> None:
    """Photos alone, and small images without and beside a stream of photos."""
    photos = [form_request("/predict", large_photo())]
    small = [form_request("/predict", image) for image in images]
    random.Random(0).shuffle(small)
    report.photo = run_wrk(server.url, photos, connections=1, duration_s=seconds)
    report.small_alone = run_wrk(server.url, small, connections=4, duration_s=seconds)
    report.small_beside_photos = _beside(server, small, photos, seconds)


def _beside(server: ServerProcess, small: list[bytes], photos: list[bytes], seconds: int) -> LoadResult:
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(run_wrk, server.url, photos, connections=1, duration_s=seconds + 1)
        result = run_wrk(server.url, small, connections=4, duration_s=seconds)
        stream.result()
    return result


if __name__ == "__main__":
    sys.exit(main())
