"""The GPU runtime: torch, with one CUDA graph for each batch size, pinned staging buffers and two streams."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.model.checkpoint import Checkpoint
from service.model.classifier import Classifier
from service.runtime.runner import PolledRunner, RunnerOptions

_WARM_UP_RUNS = 2  # libraries choose their kernels before a capture, never in it


@dataclass(frozen=True)
class StreamSlot:
    """What one stream owns: memory, and for every bucket a graph from pinned images to pinned probabilities.

    ``images`` is uint8 (largest bucket, 3, size, size), and so is ``on_device``, which the graphs read and write by its
    address alone; ``probabilities`` is float32 (largest bucket, columns of ``Runner.run``).
    """

    stream: torch.cuda.Stream
    images: NDArray[np.uint8]
    on_device: Tensor
    probabilities: NDArray[np.float32]
    graphs: dict[int, torch.cuda.CUDAGraph]


class CudaRunner(PolledRunner):
    """One GPU: bf16, channels_last, uint8 over the bus, one graph replay a batch."""

    def __init__(self, checkpoint: Checkpoint, options: RunnerOptions) -> None:
        # Else a convolution in float32 would read 10 bits of each mantissa (TF32, torch's default since Ampere); all the
        # network's arithmetic is convolutions, and bf16 does not look at this.
        torch.backends.cudnn.allow_tf32 = False
        device = torch.device(options.device if ":" in options.device else "cuda:0")
        precision = "bf16" if options.precision == "auto" else options.precision
        options = replace(options, streams=options.streams or 2)  # one batch is copied while the other computes
        # A GPU takes hardly longer for more images.
        super().__init__(options, str(device), f"torch-{precision}", options.max_batch_size)
        self._columns = len(checkpoint.metadata.class_names) + (checkpoint.typicality is not None)
        self._size = checkpoint.metadata.input.size
        self._torch_device = device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._classifier = Classifier(checkpoint, dtype, fused=precision == "bf16").to(device)
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
        probabilities = torch.zeros((largest, self._columns)).pin_memory()
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
