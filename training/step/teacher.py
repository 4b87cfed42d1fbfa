"""The teacher of a distilled network, and how its answers become part of the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.checkpoint import Checkpoint
from service.model.classifier import folded_network
from service.model.images import InputSpec
from training.recipes import Distillation


class Teacher:
    """A trained network whose answers are a target: the student's augmented batch in, its share of the loss out."""

    def __init__(
        self, checkpoint: Checkpoint, distillation: Distillation, spec: InputSpec, precision: str, device: torch.device
    ) -> None:
        """Take the network of ``checkpoint`` to ``device``; ``spec`` is what the student's images are normalised by."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = folded_network(checkpoint, fused=device.type == "cuda" and precision == "bf16")
        self.network = network.to(device, dtype).to(memory_format=torch.channels_last).requires_grad_(False)
        own = checkpoint.metadata.input
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (spec.mean, spec.std, own.mean, own.std)
        )
        self.factor, self.shift = std / own_std, (mean - own_mean) / own_std
        self.size = own.size
        self.dtype = dtype
        self.temperature, self.weight = distillation.temperature, distillation.weight

    def __call__(self, batch: Tensor) -> Tensor:
        """Return float32 logits (N, num_classes) for the student's batch, normalised float (N, 3, side, side)."""
        smaller = self.size < batch.shape[-1]
        batch = F.interpolate(batch, (self.size, self.size), mode="bilinear", antialias=smaller, align_corners=False)
        batch = (batch * self.factor + self.shift).to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, enabled=False):
            logits: Tensor = self.network(batch).float()
        return logits

    def loss(self, logits: Tensor, batch: Tensor, hard: Tensor) -> Tensor:
        """Weigh the divergence from this teacher's answers for ``batch`` against ``hard``, the loss against the labels.

        ``logits``, float32 (N, num_classes), are the student's for ``batch``. The square of the temperature keeps the two
        parts' gradients in proportion (Hinton et al. 2015, section 2).
        """
        with torch.no_grad():
            soft = (self(batch) / self.temperature).log_softmax(1)
        own = (logits / self.temperature).log_softmax(1)
        divergence = F.kl_div(own, soft, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.weight) * hard + self.weight * divergence
