"""Opens the runner that serves a checkpoint on this machine, warms it up and checks it against known images."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.cpu import available_cores, share_cores
from service.model.checkpoint import Canary, Checkpoint
from service.model.typicality import split_output
from service.runtime.runner import Runner, RunnerError, RunnerOptions

logger = logging.getLogger(__name__)


_CANARY_TOLERANCE = 0.15  # int8 moves a probability by less than this wherever the network is sure


def has_cuda() -> bool:
    """Whether the driver reports a CUDA device, asked without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def measure_device(device: str) -> tuple[int, int, float]:
    """Return the memory that all processes use together, all memory (bytes), and the share of time in which a kernel ran.

    That share, 0 to 1, is NVML's, of its last sampling period; NaN where NVML cannot be asked.
    """
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    try:
        utilization = torch.cuda.utilization(device) / 100
    except Exception:  # nvidia-ml-py is missing, whose own error classes come with it, or the driver refuses
        utilization = math.nan
    return total_bytes - free_bytes, total_bytes, utilization


def open_runner(checkpoint: Checkpoint, options: RunnerOptions | None = None) -> Runner:
    """Load ``checkpoint`` onto the device, warm it up at every bucket and check it against its known images.

    Raises CheckpointError for int8 where the checkpoint is not calibrated for it, and RunnerError when the runtime is missing,
    lacks what ``options`` ask for, or answers wrongly.
    """
    options = options or RunnerOptions()
    name = _choose_runtime(options)
    _check(name, options)
    try:
        runner = RUNTIMES[name].open(checkpoint, options)
    except ModuleNotFoundError as error:
        raise RunnerError(f"runtime {name!r} is not installed; install it with 'pip install {error.name}'") from error
    try:
        warm_up(runner, checkpoint)
    except BaseException:
        runner.close()
        raise
    logger.info(
        "model loaded name=%s version=%s runtime=%s device=%s streams=%d",
        checkpoint.metadata.name,
        checkpoint.version,
        runner.runtime,
        runner.device,
        runner.streams,
    )
    return runner


def warm_up(runner: Runner, checkpoint: Checkpoint) -> None:
    """Run every stream at every bucket, all at once, then require the known answers; raise RunnerError when one differs."""
    size, classes = checkpoint.metadata.input.size, len(checkpoint.metadata.class_names)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (runner.buckets[-1], 3, size, size), np.uint8)

    def warm_up_stream(stream: int) -> None:
        for bucket in runner.buckets:
            check_output(runner.run(images[:bucket], stream), bucket, classes, has_typicality=checkpoint.typicality is not None)
        check_canary(runner, checkpoint.canary, stream)

    with ThreadPoolExecutor(runner.streams) as threads:
        list(threads.map(warm_up_stream, range(runner.streams)))


def check_canary(runner: Runner, canary: Canary | None, stream: int = 0) -> None:
    """Require the known answers from the device, if there are any; raise RunnerError when one differs."""
    if canary is None:
        return
    step = runner.buckets[-1]
    answers = [runner.run(canary.images[start : start + step], stream) for start in range(0, len(canary.images), step)]
    probabilities, _ = split_output(np.concatenate(answers), canary.probabilities.shape[1])
    wrong = int((probabilities.argmax(1) != canary.probabilities.argmax(1)).sum())
    furthest = float(np.abs(probabilities - canary.probabilities).max())
    if wrong or not furthest <= _CANARY_TOLERANCE:
        raise RunnerError(
            f"runtime {runner.runtime} on {runner.device} answers {wrong} of {len(canary.images)} known images wrongly"
            f" and is off by up to {furthest:.3f}; try another runtime or precision"
        )


def check_output(output: NDArray[np.float32], count: int, classes: int, *, has_typicality: bool = False) -> None:
    """Raise RunnerError unless these are ``count`` finite distributions over ``classes``, and typicalities of 0 to 1."""
    if output.shape != (count, classes + has_typicality):
        raise RunnerError(f"the model gave {output.shape} for {count} images of {classes} classes")
    probabilities, typicality = split_output(output, classes)
    if typicality is not None and not ((typicality >= 0) & (typicality <= 1)).all():
        raise RunnerError("the model's typicality is not 0 to 1; the weights are damaged")
    if not np.allclose(probabilities.sum(1), 1.0, atol=1e-3):
        raise RunnerError("the model's probabilities do not sum to 1; the weights are damaged")


def _choose_runtime(options: RunnerOptions) -> str:
    if options.runtime != "auto":
        return options.runtime
    if options.device.startswith("cuda") or (options.device == "auto" and _installed("torch") and has_cuda()):
        return "torch"
    return "openvino" if _installed("openvino") else "torch"


def _check(name: str, options: RunnerOptions) -> None:
    """Raise RunnerError where the runtime ``name`` lacks the device or the precision."""
    runtime, precision = RUNTIMES[name], options.precision
    if options.device.startswith("cuda") and not runtime.cuda:
        raise RunnerError(f"runtime {name!r} runs on the CPU; use runtime 'torch' for a CUDA device")
    if precision not in ("auto", *runtime.precisions):
        others = " or ".join(repr(other) for other, has in RUNTIMES.items() if precision in has.precisions)
        own = " or ".join(map(repr, runtime.precisions))
        raise RunnerError(f"runtime {name!r} has no {precision} form; use runtime {others}, or precision {own}")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _with_shares(options: RunnerOptions) -> RunnerOptions:
    """Fill in the threads and streams of a model on the CPU."""
    shares = share_cores(available_cores(), cpu_threads=options.threads, streams=options.streams)
    return replace(options, threads=shares.cpu_threads, streams=shares.streams)


def _openvino(checkpoint: Checkpoint, options: RunnerOptions) -> Runner:
    from service.runtime.openvino_runner import OpenVinoRunner

    return OpenVinoRunner(checkpoint, _with_shares(options))


def _torch(checkpoint: Checkpoint, options: RunnerOptions) -> Runner:
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise RunnerError(f"device {options.device!r} was asked for and torch finds no CUDA device; use device 'cpu'")
    if options.device == "cpu" or not torch.cuda.is_available():
        from service.runtime.torch_cpu_runner import TorchCpuRunner

        return TorchCpuRunner(checkpoint, _with_shares(options))
    from service.runtime.cuda_runner import CudaRunner

    return CudaRunner(checkpoint, options)


class Runtime(NamedTuple):
    """What opens a runtime's runner, the precisions that it has, and whether it has CUDA devices; each has the CPU."""

    open: Callable[[Checkpoint, RunnerOptions], Runner]
    precisions: tuple[str, ...]
    cuda: bool = False


RUNTIMES = {
    "openvino": Runtime(_openvino, ("int8", "bf16", "fp32")),
    "torch": Runtime(_torch, ("bf16", "fp32"), cuda=True),
}
