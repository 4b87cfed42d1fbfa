"""What the parts of a request allow by themselves, with every core busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np

from service.model.checkpoint import Checkpoint
from service.model.images import InputSpec, decode_image
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions

BATCH_SIZES = (1, 8, 16, 32, 64)


def model_rates(checkpoint: Checkpoint, *, seconds: float) -> tuple[dict[int, float], bool]:
    """Images per second at each batch size, all streams busy; and whether the model runs on the processor's cores."""
    runner = open_runner(checkpoint, RunnerOptions(max_batch_size=BATCH_SIZES[-1]))
    size, rng = checkpoint.metadata.input.size, np.random.default_rng(0)
    streams = runner.streams - runner.lone
    try:
        rates = {}
        with ThreadPoolExecutor(streams) as pool:
            for batch in BATCH_SIZES:
                images = rng.integers(0, 256, (batch, 3, size, size), np.uint8)
                works = [partial(runner.run, images, stream) for stream in range(streams)]
                rates[batch] = batch * sum(pool.map(partial(calls_per_s, seconds=seconds), works))
        return rates, runner.device == "cpu"
    finally:
        runner.close()


def decode_rate(image: bytes, spec: InputSpec, *, processes: int, seconds: float) -> float:
    """Images per second that so many processes decode together; they are forked, so no thread may run yet."""
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        work = partial(decode_image, image, spec)
        return sum(pool.map(partial(calls_per_s, seconds=seconds), [work] * processes))


def calls_per_s(work: Callable[[], object], *, seconds: float) -> float:
    """Return how often ``work`` can be called in a second, after a first time."""
    work()
    began, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not calls:
        work()
        calls += 1
    return calls / took
