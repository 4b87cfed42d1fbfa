"""Timing in this process: the model alone at every batch size, and any function."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from service.model.checkpoint import Checkpoint
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions

BATCH_SIZES = (1, 8, 16, 32, 64)
_ROUNDS = 7


def time_model(checkpoint: Checkpoint, *, runtime: str, precision: str, threads: int) -> dict[int, float]:
    """Images per second of the runner at each batch size, the median of several rounds."""
    options = RunnerOptions(runtime=runtime, precision=precision, threads=threads, streams=1, max_batch_size=BATCH_SIZES[-1])
    runner = open_runner(checkpoint, options)
    size = checkpoint.metadata.input.size
    rng = np.random.default_rng(0)
    try:
        rates = {}
        for batch in BATCH_SIZES:
            images = rng.integers(0, 256, (batch, 3, size, size), np.uint8)
            rates[batch] = batch / seconds_of(lambda images=images: runner.run(images))  # type: ignore[misc]  # bound at once
        return rates
    finally:
        runner.close()


def seconds_of(work: Callable[[], object]) -> float:
    """Median time of one call in seconds, over rounds of at least a tenth of a second each."""
    work()
    calls, rounds = 1, []
    while True:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        took = time.perf_counter() - began
        if took < 0.1:
            calls *= 2
            continue
        rounds.append(took / calls)
        if len(rounds) == _ROUNDS:
            return statistics.median(rounds)
