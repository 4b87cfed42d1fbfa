"""The parts of a prediction, each alone in this process: the model at every batch size, decoding, and reading a form.

Owns: those measurements. Does not know: servers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.load.closed_loop import multipart_request
from service.model.checkpoint import Checkpoint
from service.model.images import decode_image
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from service.web.multipart import parse_form

BATCH_SIZES = (1, 8, 16, 32, 64)
_ROUNDS = 7


def time_model(checkpoint: Checkpoint, *, runtime: str, precision: str, threads: int) -> dict[int, float]:
    """Give images per second of the runner at each batch size, the median of several rounds."""
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


def time_decode(checkpoint: Checkpoint, images: list[bytes]) -> float:
    """Give microseconds per image for decoding ``images``."""
    spec = checkpoint.metadata.input
    return seconds_of(lambda: [decode_image(image, spec) for image in images]) / len(images) * 1e6


def time_form(images: list[bytes]) -> float:
    """Give microseconds per request for cutting the image out of its form."""
    bodies = [multipart_request("/", image).partition(b"\r\n\r\n")[2] for image in images]
    content_type = b"multipart/form-data; boundary=" + bodies[0].split(b"\r\n")[0][2:]
    return seconds_of(lambda: [parse_form(body, content_type, max_parts=2) for body in bodies]) / len(bodies) * 1e6


def seconds_of(work: Callable[[], object]) -> float:
    """Give the median time of one call in seconds, over rounds of at least a tenth of a second each."""
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
