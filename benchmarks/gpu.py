"""``python -m benchmarks.gpu``: the service on a GPU: the device alone, single images over HTTP, batches of pixels over /v2.

Owns: what is run, and in which order; Markdown. Does not know: how a server is started or loaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.load.closed_loop import LoadResult, run_wrk
from benchmarks.load.uploads import form_request, pixels_request, small_jpegs
from benchmarks.servers.footprint import group_cpu_s
from benchmarks.servers.server_process import ServerProcess, exit_on_signals
from benchmarks.servers.servers import start_server
from service.cpu import available_cores
from service.model.checkpoint import load_checkpoint
from service.runtime.cuda_runner import CudaRunner
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from service.settings import DEFAULT_CHECKPOINT

BATCH_SIZES = (1, 8, 32, 64, 128, 256)
CONNECTIONS = (1, 16, 32, 64, 256, 512)
PIXEL_LOADS = ((64, 32), (256, 16))  # images a request, connections
FOR_BATCHES = {"SERVICE_MAX_BATCH_SIZE": "256", "SERVICE_MAX_QUEUE_IMAGES": "16384"}
_CALLS = 300
_LOAD_THREADS = 2


def main() -> int:
    """Measure and print; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--seconds", type=int, default=3, help="of each load, after one of warm-up")
    options = parser.parse_args()
    exit_on_signals()
    if not torch.cuda.is_available():
        sys.stderr.write("error: torch finds no CUDA device here\n")
        return 2
    print(f"{torch.cuda.get_device_name()}, {available_cores()} cores, torch {torch.__version__}\n")
    report_device(options.checkpoint)
    images = [form_request("/predict", image) for image in small_jpegs()]
    with start_server("ours", options.checkpoint) as server:
        print(f"\nSettings as they come, ready after {server.ready_s:.1f} s:\n")
        report_loads(server, [(connections, images, 1) for connections in CONNECTIONS], options.seconds)
    with start_server("ours", options.checkpoint, FOR_BATCHES) as server:
        told = ", ".join(f"`{name}={value}`" for name, value in FOR_BATCHES.items())
        print(f"\n{told}, ready after {server.ready_s:.1f} s:\n")
        loads = [(CONNECTIONS[-1], images, 1)]
        model = load_checkpoint(options.checkpoint).metadata.name
        loads += [(connections, [pixels_request(model, count)], count) for count, connections in PIXEL_LOADS]
        report_loads(server, loads, options.seconds)
    return 0


def report_device(path: Path) -> None:
    """Print what the runner takes for a batch, and what the replay of its graph alone takes."""
    runner = open_runner(load_checkpoint(path), RunnerOptions(max_batch_size=BATCH_SIZES[-1]))
    assert isinstance(runner, CudaRunner), "torch finds a CUDA device"
    print("| batch | graph replay | runner | ratio | images/s of one stream |\n| ---: | ---: | ---: | ---: | ---: |")
    size = load_checkpoint(path).metadata.input.size
    rng = np.random.default_rng(0)
    for batch in BATCH_SIZES:
        images = rng.integers(0, 256, (batch, 3, size, size), np.uint8)
        whole_us = _microseconds(lambda images=images: runner.run(images))  # type: ignore[misc]  # bound at once
        replay_us = _replay_microseconds(runner, batch)
        rate = batch / whole_us * 1e6
        print(f"| {batch} | {replay_us:.0f} µs | {whole_us:.0f} µs | {whole_us / replay_us:.2f} | {rate:,.0f} |", flush=True)
    runner.close()


def report_loads(server: ServerProcess, loads: list[tuple[int, list[bytes], int]], seconds: int) -> None:
    """Print a row for each (connections, requests, images a request)."""
    print("| images a request | connections | requests/s | images/s | p50 | p99 | refused | broken | CPU a request |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for connections, requests, images in loads:
        _load(server, requests, connections, 1)
        before = group_cpu_s(server.pid)
        result = _load(server, requests, connections, seconds)
        cpu_ms = (group_cpu_s(server.pid) - before) / result.requests * 1e3
        answered = result.requests_per_s * (1 - result.errors / result.requests)
        print(
            f"| {images} | {connections} | {answered:,.0f} | {answered * images:,.0f} | {result.p50_ms:.1f} ms"
            f" | {result.p99_ms:.1f} ms | {result.refused} | {result.broken} | {cpu_ms:.2f} ms |",
            flush=True,
        )


def _load(server: ServerProcess, requests: list[bytes], connections: int, seconds: int) -> LoadResult:
    threads = min(_LOAD_THREADS, connections)
    return run_wrk(server.url, requests, connections=connections, duration_s=seconds, threads=threads)


def _microseconds(work: Callable[[], object]) -> float:
    for _ in range(_CALLS // 10):
        work()
    began = time.perf_counter()
    for _ in range(_CALLS):
        work()
    return (time.perf_counter() - began) / _CALLS * 1e6


def _replay_microseconds(runner: CudaRunner, batch: int) -> float:
    """One replay after the other, timed on the device."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    slot = runner.slots[0]
    with torch.cuda.stream(slot.stream):
        first.record()
        for _ in range(_CALLS):
            slot.graphs[batch].replay()
        last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / _CALLS * 1e3


if __name__ == "__main__":
    sys.exit(main())
