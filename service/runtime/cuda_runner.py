"""The torch runtime: one CUDA graph per bucket on a GPU, plain eager on a CPU without OpenVINO.

Owns: the network on the device, pinned staging buffers, streams and graphs. Does not know: requests, queues.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from service.cpu import has_bf16
from service.model.checkpoint import Calibration, Checkpoint
from service.model.dense_conv import use_dense_convolutions
from service.model.fused_conv import use_fused_convolutions
from service.model.network import BasicBlock, ResNet18, model_from_checkpoint
from service.runtime.runner import Runner, RunnerError, RunnerOptions, buckets_up_to, measure_request_cost

# Two threads: 200 images/s at a batch of 1, 1,170 at 8, 2,860 at 32, 3,850 at 64.
_CPU_EFFICIENT_BATCH = 32
_WARM_UP_RUNS = 2  # libraries choose their kernels before a capture, never in it


def open_torch_runner(checkpoint: Checkpoint, options: RunnerOptions, threads: int) -> Runner:
    """Load onto CUDA if ``options.device`` allows it and there is one, else onto the CPU; raise RunnerError otherwise."""
    wants_cuda = options.device.startswith("cuda")
    if wants_cuda and not torch.cuda.is_available():
        raise RunnerError(f"device {options.device!r} was asked for and torch finds no CUDA device; use device 'cpu'")
    if options.precision == "int8":
        raise RunnerError("runtime 'torch' has no int8 form; use runtime 'openvino', or precision 'bf16' or 'fp32'")
    if options.device == "cpu" or not torch.cuda.is_available():
        return TorchCpuRunner(checkpoint, options, threads)
    return CudaRunner(checkpoint, options)


class Classifier(nn.Module):
    """uint8 images in, calibrated probabilities out: everything that runs on the device, in one module."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        network = model_from_checkpoint(checkpoint)
        if isinstance(network, ResNet18):
            fold_batch_norms(network)
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        spec = checkpoint.metadata.input
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.calibration = checkpoint.metadata.calibration
        self.dtype = dtype
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 3, size, size) to float32 (N, num_classes), on the module's device."""
        x = ((images.float() - self.mean) / self.std).to(dtype=self.dtype, memory_format=torch.channels_last)
        return calibrated(self.network(x).float(), self.calibration).softmax(1)


def calibrated(logits: Tensor, calibration: Calibration) -> Tensor:
    """Put logits, float (N, num_classes), on the curve of ``calibration``; softmax makes calibrated probabilities of them."""
    centred = logits - logits.amax(1, keepdim=True)
    return centred / calibration.temperature + calibration.cubic * centred**3


def fold_batch_norms(network: ResNet18) -> None:
    """Fold every batch norm (running statistics) into the convolution before it, in place."""
    network.stem[0] = _folded(network.stem[0], network.stem[1])
    network.stem[1] = nn.Identity()
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.conv1 = _folded(block.conv1, block.norm1)
            block.conv2 = _folded(block.conv2, block.norm2)
            block.norm1 = block.norm2 = nn.Identity()  # type: ignore[assignment]  # swapped for good


def _folded(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d), "the network's own layers"
    assert isinstance(norm, nn.BatchNorm2d), "the network's own layers"
    return fuse_conv_bn_eval(conv, norm)


class TorchCpuRunner:
    """A ``service.runtime.runner.Runner`` in eager torch; batches are not padded, since no shape costs more than another."""

    device = "cpu"

    def __init__(self, checkpoint: Checkpoint, options: RunnerOptions, threads: int) -> None:
        # One thread a stream, as with OpenVINO: threads of one operator wait for each other, and for the busy workers.
        self.streams = options.streams or threads
        self.wide_stream: int | None = None
        torch.set_num_threads(max(1, threads // self.streams))
        precision = options.precision
        if precision == "auto":
            precision = "bf16" if has_bf16() else "fp32"
        self.runtime = f"torch-{precision}"
        self.buckets = buckets_up_to(options.max_batch_size)
        self.efficient_batch = min(_CPU_EFFICIENT_BATCH, options.max_batch_size)
        self._classifier = Classifier(checkpoint, torch.bfloat16 if precision == "bf16" else torch.float32)
        size = checkpoint.metadata.input.size
        example = torch.zeros((1, 3, size, size), dtype=self._classifier.dtype)
        use_dense_convolutions(self._classifier.network, example.to(memory_format=torch.channels_last))
        self.request_cost = measure_request_cost(self.run, size, self.efficient_batch)

    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """See ``Runner.run``."""
        with torch.inference_mode():
            probabilities: NDArray[np.float32] = self._classifier(torch.from_numpy(images)).numpy()
        return probabilities

    def close(self) -> None:
        """See ``Runner.close``."""


@dataclass(frozen=True)
class StreamSlot:
    """What one stream owns: memory, and for every bucket a graph from pinned images to pinned probabilities.

    ``images`` is uint8 (largest bucket, 3, size, size), and so is ``on_device``, which the graphs read and write by its
    address alone; ``probabilities`` is float32 (largest bucket, num_classes).
    """

    stream: torch.cuda.Stream
    images: NDArray[np.uint8]
    on_device: Tensor
    probabilities: NDArray[np.float32]
    graphs: dict[int, torch.cuda.CUDAGraph]


class CudaRunner:
    """A ``PolledRunner`` on one GPU: bf16, channels_last, uint8 over the bus, one graph replay a batch."""

    def __init__(self, checkpoint: Checkpoint, options: RunnerOptions) -> None:
        # Else a convolution in float32 would read 10 bits of each mantissa (TF32, torch's default since Ampere); all the
        # network's arithmetic is convolutions, and bf16 does not look at this.
        torch.backends.cudnn.allow_tf32 = False
        device = torch.device(options.device if ":" in options.device else "cuda:0")
        self.device = str(device)
        precision = "bf16" if options.precision == "auto" else options.precision
        self.runtime = f"torch-{precision}"
        # Two, so that one batch is copied while the other computes.
        self.streams = options.streams or 2
        self.wide_stream: int | None = None
        self.buckets = buckets_up_to(options.max_batch_size)
        self.request_cost = 0.0
        self.efficient_batch = self.buckets[-1]  # a GPU takes hardly longer for more images
        self._classes = len(checkpoint.metadata.class_names)
        self._size = checkpoint.metadata.input.size
        self._torch_device = device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._classifier = Classifier(checkpoint, dtype).to(device)
        if precision == "bf16" and isinstance(self._classifier.network, ResNet18):
            use_fused_convolutions(self._classifier.network)
        self.slots = [self._make_slot() for _ in range(self.streams)]
        self._counts = [0] * self.streams  # the images of the batch on each

    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """See ``Runner.run``."""
        self.begin([images], stream)
        self.slots[stream].stream.synchronize()
        return self._answer(stream)

    def begin(self, parts: Sequence[NDArray[np.uint8]], stream: int) -> None:
        """See ``PolledRunner.begin``."""
        count = sum(map(len, parts))
        slot = self.slots[stream]
        np.concatenate(parts, out=slot.images[:count])
        self._counts[stream] = count
        with torch.cuda.stream(slot.stream):
            slot.graphs[self.buckets[bisect_left(self.buckets, count)]].replay()

    def look(self, stream: int) -> NDArray[np.float32] | None:
        """See ``PolledRunner.look``."""
        return self._answer(stream) if self.slots[stream].stream.query() else None

    def _answer(self, stream: int) -> NDArray[np.float32]:
        return self.slots[stream].probabilities[: self._counts[stream]].copy()

    def close(self) -> None:
        """See ``Runner.close``."""
        self.slots.clear()
        torch.cuda.empty_cache()

    def _make_slot(self) -> StreamSlot:
        largest = self.buckets[-1]
        images = torch.zeros((largest, 3, self._size, self._size), dtype=torch.uint8).pin_memory()
        probabilities = torch.zeros((largest, self._classes)).pin_memory()
        on_device = torch.empty_like(images, device=self._torch_device)
        stream = torch.cuda.Stream(self._torch_device)
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()  # graphs of one stream never run at once, so they share their memory

        def answer(bucket: int) -> None:
            on_device[:bucket].copy_(images[:bucket], non_blocking=True)
            probabilities[:bucket].copy_(self._classifier(on_device[:bucket]), non_blocking=True)

        with torch.inference_mode(), torch.cuda.device(self._torch_device):
            for bucket in reversed(self.buckets):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UP_RUNS):
                        answer(bucket)
                stream.synchronize()
                graphs[bucket] = torch.cuda.CUDAGraph()
                # A model that is loaded beside another is captured while that one's streams run.
                with torch.cuda.graph(graphs[bucket], pool=pool, stream=stream, capture_error_mode="thread_local"):
                    answer(bucket)
        return StreamSlot(stream, images.numpy(), on_device, probabilities.numpy(), graphs)
