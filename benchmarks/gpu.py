"""The targets of a GPU: the device alone, single images over HTTP, batches of pixels over /v2."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.load.uploads import form_request, pixels_request, small_jpegs
from benchmarks.parts import calls_per_s
from benchmarks.report import Page
from benchmarks.servers.servers import start_server
from benchmarks.taking_turns import HEAD, Contender, run_rounds, table_rows
from service.model.checkpoint import load_checkpoint
from service.runtime.cuda_runner import CudaRunner
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions

BATCH_SIZES = (1, 8, 32, 64, 128, 256)
CONNECTIONS = (1, 16, 32, 64, 256, 512)
FOR_BATCHES = {"SERVICE_MAX_BATCH_SIZE": "256", "SERVICE_MAX_QUEUE_IMAGES": "16384"}
_CALLS = 300


def measure_gpu(page: Page, path: Path, seconds: float) -> None:
    """Add the targets of one H200 with 16 cores."""
    checkpoint = load_checkpoint(path)
    runner, size = open_runner(checkpoint, RunnerOptions(max_batch_size=BATCH_SIZES[-1])), checkpoint.metadata.input.size
    assert isinstance(runner, CudaRunner), "torch finds a CUDA device"
    rows, worst = [], 0.0
    for batch in BATCH_SIZES:
        images = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
        whole_us = 1e6 / calls_per_s(partial(runner.run, images), seconds=seconds / 3)
        replay_us = _replay_microseconds(runner, batch)
        worst = max(worst, whole_us / replay_us)
        rows.append([f"{batch}", f"{replay_us:.0f} µs", f"{whole_us:.0f} µs", f"{batch / whole_us * 1e6:,.0f}"])
    runner.close()
    page.table(torch.cuda.get_device_name(), ["batch", "graph replay", "runner", "images/s of one stream"], rows)
    page.target("GPU: the runner at most 1.1 of its graph's replay", f"{worst:.2f}", met=worst <= 1.1)
    with start_server("ours", path, FOR_BATCHES) as server:
        single = Contender("single images", server, [form_request("/predict", image) for image in small_jpegs()])
        pixels = Contender("256 images of pixels", server, [pixels_request(checkpoint.metadata.name, 256)])
        for connections in CONNECTIONS:
            run_rounds([single], connections, 1, seconds)
        run_rounds([pixels], 16, 1, seconds)
    rows = table_rows([single], CONNECTIONS) + table_rows([pixels], [16])
    page.table(f"GPU, {FOR_BATCHES}", HEAD, rows)
    rates = {connections: single.median(connections, lambda turn: turn.rate) for connections in CONNECTIONS}
    best, pixels_rate = max(rates.values()), 256 * pixels.median(16, lambda turn: turn.rate)
    half = min(connections for connections in CONNECTIONS if rates[connections] >= best / 2)
    p99 = single.median(half, lambda turn: turn.load.p99_ms)
    page.target("GPU: 80,000 single images/s", f"{best:,.0f}", met=best >= 80_000)
    page.target("GPU: p99 at most 5 ms at half of that", f"{p99:.1f} ms at {rates[half]:,.0f}/s", met=p99 <= 5)
    page.target("GPU: 500,000 images/s of pixels", f"{pixels_rate:,.0f}", met=pixels_rate >= 500_000)


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
