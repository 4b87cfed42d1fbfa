"""The CPU runtime: OpenVINO, in int8 where the checkpoint is calibrated for it; one compiled model for each stream."""

from __future__ import annotations

from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from service.cpu import has_int8_dot_products
from service.model.checkpoint import Checkpoint
from service.model.images import InputSpec
from service.runtime.openvino_graph import build_graph, frame_pixel
from service.runtime.runner import Runner, RunnerOptions

# One thread of `make bench`: 1,440 images/s at a batch of 1, 5,187 at 8, 7,240 at 32.
_EFFICIENT_BATCH = 8
# Where the form with the images last is faster, with AMX and without: 0.6 of the time at 32 pixels, 0.9 at 64, 1.0 at 128.
_BATCH_LAST_FROM = 3  # images
_BATCH_LAST_UP_TO = 64  # pixels a side
# A lone batch takes less than 0.8 of the time on two cores. More cores have not been measured.
_LONE_THREADS = 2


class _Stream:
    """Requests for few and for many images, their input for each bucket, and where the images go: in it, without its frame."""

    def __init__(self, few: ov.CompiledModel, many: ov.CompiledModel, buckets: tuple[int, ...], spec: InputSpec) -> None:
        _, _, height, width = few.input().partial_shape
        buffer = np.empty((buckets[-1], 3, height.get_length(), width.get_length()), np.uint8)
        buffer[:] = frame_pixel(spec)
        frame = (height.get_length() - spec.size) // 2
        self.few, self.many = few.create_infer_request(), many.create_infer_request()
        self.inputs = {bucket: ov.Tensor(buffer[:bucket], shared_memory=True) for bucket in buckets}
        self.images = buffer[:, :, frame : frame + spec.size, frame : frame + spec.size]


class OpenVinoRunner(Runner):
    """``precision`` auto is int8 if the checkpoint and the CPU allow it, else bf16, else fp32."""

    def __init__(self, checkpoint: Checkpoint, options: RunnerOptions) -> None:
        core = shared_core()
        precision = options.precision
        if precision == "auto":
            precision = _fastest_precision(core, checkpoint)
        lone = options.streams > 1 and options.threads == _LONE_THREADS
        super().__init__(options, "cpu", f"openvino-{precision}", _EFFICIENT_BATCH, lone=lone)
        # Each stream is a model of its own: of a model with several streams, OpenVINO hands each batch to a thread of its
        # own, which costs as much as a tenth of the batch, where one stream of one thread runs in the caller's.
        hints = {
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "ENABLE_CPU_PINNING": False,
        }
        spec = checkpoint.metadata.input
        few = many = build_graph(checkpoint, precision)
        if self.buckets[-1] >= _BATCH_LAST_FROM and spec.size <= _BATCH_LAST_UP_TO:
            many = build_graph(checkpoint, precision, batch_last=True)

        def stream(threads: int) -> _Stream:
            options = hints | {"INFERENCE_NUM_THREADS": threads}
            compiled = [core.compile_model(graph, "CPU", options) for graph in ([few] if few is many else [few, many])]
            return _Stream(compiled[0], compiled[-1], self.buckets, spec)

        with ThreadPoolExecutor(options.threads) as pool:
            threads = [max(1, options.threads // options.streams)] * options.streams
            self._streams = list(pool.map(stream, [*threads, *[options.threads] * lone]))

    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """See ``Runner.run``."""
        count = len(images)
        bucket = self.buckets[bisect_left(self.buckets, count)]
        slot = self._streams[stream]
        slot.images[:count] = images  # what is left of an earlier batch pads this one
        request = slot.few if bucket < _BATCH_LAST_FROM else slot.many
        request.set_input_tensor(slot.inputs[bucket])
        request.infer()
        probabilities: NDArray[np.float32] = request.get_output_tensor().data[:count].copy()
        return probabilities

    def close(self) -> None:
        """See ``Runner.close``."""
        self._streams.clear()


@cache
def shared_core() -> ov.Core:
    """Return the one OpenVINO core of this process, which is never freed.

    OpenVINO gives the thread that makes a core a stack for signals; a core that ends puts back the one before it, which may
    be that of a core that has ended already. The next signal to that thread then ended the process (2026.4).
    """
    return ov.Core()


def _fastest_precision(core: ov.Core, checkpoint: Checkpoint) -> str:
    if checkpoint.metadata.calibration.activation_max and has_int8_dot_products():
        return "int8"
    return "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"
