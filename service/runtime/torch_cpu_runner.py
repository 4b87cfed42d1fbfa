"""The torch runtime on a CPU, for machines without an OpenVINO wheel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from service.cpu import has_bf16
from service.model.checkpoint import Checkpoint
from service.model.classifier import Classifier
from service.runtime.runner import Runner, RunnerOptions

# Two threads: 200 images/s at a batch of 1, 1,170 at 8, 2,860 at 32, 3,850 at 64.
_CPU_EFFICIENT_BATCH = 32


class TorchCpuRunner(Runner):
    """Eager torch; batches are not padded, since no shape costs more than another."""

    def __init__(self, checkpoint: Checkpoint, options: RunnerOptions) -> None:
        torch.set_num_threads(max(1, options.threads // options.streams))
        precision = options.precision
        if precision == "auto":
            precision = "bf16" if has_bf16() else "fp32"
        super().__init__(options, "cpu", f"torch-{precision}", _CPU_EFFICIENT_BATCH)
        self._classifier = Classifier(checkpoint, torch.bfloat16 if precision == "bf16" else torch.float32)

    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """See ``Runner.run``."""
        with torch.inference_mode():
            probabilities: NDArray[np.float32] = self._classifier(torch.from_numpy(images)).numpy()
        return probabilities

    def close(self) -> None:
        """See ``Runner.close``."""
