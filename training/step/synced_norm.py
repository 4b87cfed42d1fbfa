"""Batch norm over the batches of all processes: torch's own on GPUs, and one for a CPU, where torch has none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def total(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all processes, a new tensor; every process must ask."""
    result = values.clone()
    dist.all_reduce(result)
    return result


class _Total(torch.autograd.Function):
    """``total`` with its gradient, which is the sum of theirs."""

    @staticmethod
    def forward(_ctx: FunctionCtx, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    def backward(_ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return total(gradient)


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm on a CPU, whose statistics in training are those of all processes' batches together, of one size each."""

    def forward(self, input: Tensor) -> Tensor:  # nn.BatchNorm2d's own name
        """Map float (N, num_features, ...) to the same shape and dtype; statistics are float32."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None, "the network's norms keep statistics"
        assert self.running_var is not None, "the network's norms keep statistics"
        assert self.momentum is not None, "the network's norms have a momentum"
        assert self.num_batches_tracked is not None, "the network's norms keep statistics"
        x = input.float()
        places = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean: Tensor = _Total.apply(x.sum(places, keepdim=True)) / count
        centred = x - mean
        variance: Tensor = _Total.apply(centred.square().sum(places, keepdim=True)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight.view_as(mean) * (variance + self.eps).rsqrt()
        return (centred * scale + self.bias.view_as(mean)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take images of any number of axes, as ``training.step.images_last`` has them."""


class _GpuSyncedBatchNorm(nn.SyncBatchNorm):
    process_group = None  # all processes


def use_synced_norms(model: nn.Module, device: torch.device) -> None:
    """Let every batch norm of ``model``, on ``device``, take its statistics over all processes; parameters and names stay."""
    synced: type[nn.Module] = _GpuSyncedBatchNorm if device.type == "cuda" else SyncedBatchNorm
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = synced
