"""The device: one loaded model behind ``run(images) -> probabilities``, whatever runs it.

Owns: which runtime serves a checkpoint here, the batch-size buckets, warm-up and the check against known images.
The runtimes are ``openvino_runner`` and ``cuda_runner``; only the chosen one is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from service.cpu import available_cores
from service.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# On a CPU a batch of more than 8 images hardly gains, so a step of half a power of two wastes little padding.
_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_REQUEST_S = 0.00012  # of its HTTP worker's core, by ``make bench``
_REQUEST_COST_RUNS = 3
_CANARY_TOLERANCE = 0.15  # int8 moves a probability by less than this wherever the network is sure


class RunnerError(Exception):
    """A model that cannot be loaded or does not answer as it must; the message says why and what to do."""


class Runner(Protocol):
    """One resident model. ``run`` may be called from a thread for each of its ``streams``, with the stream's number."""

    device: str
    runtime: str
    streams: int
    wide_stream: int | None  # the number of one more, which takes the cores of all of them, so that nothing runs beside it
    buckets: tuple[int, ...]
    request_cost: float  # what a request costs its HTTP worker, in images of a stream; 0 where streams take no cores
    efficient_batch: int  # from here on a batch takes time in proportion to its bucket; at most ``buckets[-1]``

    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """Map uint8 (N, 3, size, size), RGB, to calibrated probabilities, float32 (N, num_classes).

        N is 1 to ``buckets[-1]``; a batch is padded to the next bucket and the padding is cut off the answer. The array
        that comes back belongs to the caller. Raises whatever the device raises.
        """
        ...

    def close(self) -> None:
        """Give the device's memory back."""
        ...


@runtime_checkable
class PolledRunner(Runner, Protocol):
    """A runner whose device works by itself: beginning a batch and looking whether it is done take microseconds."""

    def begin(self, parts: Sequence[NDArray[np.uint8]], stream: int) -> None:
        """Begin a batch of arrays uint8 (n, 3, size, size), ``buckets[-1]`` images in all at most; one at a time a stream."""
        ...

    def look(self, stream: int) -> NDArray[np.float32] | None:
        """Give what ``run`` would for the batch that was begun, or None while it is not done; raise what the device raises."""
        ...


@dataclass(frozen=True)
class RunnerOptions:
    """What a caller may choose; ``auto`` and 0 choose by the machine and the checkpoint.

    ``threads`` are the processor threads of the model in all, shared by the ``streams`` that run beside each other.
    """

    runtime: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    streams: int = 0
    max_batch_size: int = 64


def buckets_up_to(max_batch_size: int) -> tuple[int, ...]:
    """Give the batch sizes that are prepared, ascending; the last is ``max_batch_size`` itself."""
    return (*(size for size in _BUCKETS if size < max_batch_size), max_batch_size)


def measure_request_cost(run: Callable[[NDArray[np.uint8]], object], size: int, batch: int) -> float:
    """Give what a request costs its HTTP worker, in images of ``size`` pixels a side that ``run`` takes ``batch`` at a time.

    By this thread's processor time, which other work on the machine does not change; a network that is larger, or a processor
    that is slower at it, takes several times as long for an image, and hardly longer for a request.
    """
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
    run(images)
    times = []
    for _ in range(_REQUEST_COST_RUNS):
        began = time.thread_time()
        run(images)
        times.append(time.thread_time() - began)
    return _REQUEST_S * batch / max(min(times), 1e-6)


def has_cuda() -> bool:
    """Whether the driver reports a CUDA device, asked without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def open_runner(checkpoint: Checkpoint, options: RunnerOptions | None = None) -> Runner:
    """Load ``checkpoint`` onto the device, warm it up at every bucket and check it against its known images.

    Raises CheckpointError for weights that do not fit and RunnerError when the runtime is missing or answers wrongly.
    """
    options = options or RunnerOptions()
    name = _choose_runtime(options)
    threads = options.threads or available_cores()
    runner = _RUNTIMES[name](checkpoint, options, threads)
    try:
        warm_up(runner, checkpoint)
    except BaseException:
        runner.close()
        raise
    logger.info(
        "model loaded name=%s version=%s runtime=%s device=%s streams=%d threads=%d",
        checkpoint.metadata.name,
        checkpoint.version,
        runner.runtime,
        runner.device,
        runner.streams,
        threads,
    )
    return runner


def all_streams(runner: Runner) -> list[int]:
    """Give the numbers of its streams, the wide one, if there is one, last."""
    return [*range(runner.streams), *([] if runner.wide_stream is None else [runner.wide_stream])]


def warm_up(runner: Runner, checkpoint: Checkpoint) -> None:
    """Run every stream at every bucket, all at once, then require the known answers; raise RunnerError when one differs."""
    size, classes = checkpoint.metadata.input.size, len(checkpoint.metadata.class_names)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (runner.buckets[-1], 3, size, size), np.uint8)

    def warm_up_stream(stream: int) -> None:
        for bucket in runner.buckets:
            check_probabilities(runner.run(images[:bucket], stream), bucket, classes)
        check_canary(runner, checkpoint, stream)

    streams = all_streams(runner)
    with ThreadPoolExecutor(len(streams)) as threads:
        list(threads.map(warm_up_stream, streams))


def check_canary(runner: Runner, checkpoint: Checkpoint, stream: int = 0) -> None:
    """Require the checkpoint's known answers from the device; raise RunnerError when one differs."""
    canary = checkpoint.canary
    if canary is None:
        return
    step = runner.buckets[-1]
    answers = [runner.run(canary.images[start : start + step], stream) for start in range(0, len(canary.images), step)]
    probabilities = np.concatenate(answers)
    wrong = int((probabilities.argmax(1) != canary.probabilities.argmax(1)).sum())
    furthest = float(np.abs(probabilities - canary.probabilities).max())
    if wrong or not furthest <= _CANARY_TOLERANCE:
        raise RunnerError(
            f"runtime {runner.runtime} on {runner.device} answers {wrong} of {len(canary.images)} known images wrongly"
            f" and is off by up to {furthest:.3f}; try another runtime or precision"
        )


def check_probabilities(probabilities: NDArray[np.float32], count: int, classes: int) -> None:
    """Raise RunnerError unless these are ``count`` finite distributions over ``classes``."""
    if probabilities.shape != (count, classes):
        raise RunnerError(f"the model gave {probabilities.shape} for {count} images of {classes} classes")
    if not np.allclose(probabilities.sum(1), 1.0, atol=1e-3):
        raise RunnerError("the model's probabilities do not sum to 1; the weights are damaged")


def _choose_runtime(options: RunnerOptions) -> str:
    if options.runtime != "auto":
        return options.runtime
    if options.device.startswith("cuda") or (options.device == "auto" and _installed("torch") and has_cuda()):
        return "torch"
    return "openvino" if _installed("openvino") else "torch"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _openvino(checkpoint: Checkpoint, options: RunnerOptions, threads: int) -> Runner:
    if not _installed("openvino"):
        raise RunnerError("runtime 'openvino' is not installed; install it with 'pip install openvino'")
    from service.runtime.openvino_runner import OpenVinoRunner

    return OpenVinoRunner(checkpoint, options, threads)


def _torch(checkpoint: Checkpoint, options: RunnerOptions, threads: int) -> Runner:
    if not _installed("torch"):
        raise RunnerError("runtime 'torch' is not installed; install it with 'pip install torch'")
    from service.runtime.cuda_runner import open_torch_runner

    return open_torch_runner(checkpoint, options, threads)


_RUNTIMES: dict[str, Callable[[Checkpoint, RunnerOptions, int], Runner]] = {"openvino": _openvino, "torch": _torch}
