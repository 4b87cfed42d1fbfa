"""Batch norm over the batches of all processes, on a CPU, where ``nn.SyncBatchNorm`` has no implementation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_ctx: FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of all processes' batches together, of one size each."""

    def forward(self, input: Tensor) -> Tensor:  # nn.BatchNorm2d's own name
        """Map float (N, num_features, H, W) to the same shape and dtype; statistics are float32."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None, "the network's norms keep statistics"
        assert self.running_var is not None, "the network's norms keep statistics"
        assert self.momentum is not None, "the network's norms have a momentum"
        assert self.num_batches_tracked is not None, "the network's norms keep statistics"
        x = input.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _sum_over_processes(x.sum((0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = _sum_over_processes(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)


def use_synced_norms(model: nn.Module) -> None:
    """Let every batch norm of ``model`` take its statistics over all processes; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d


def _sum_over_processes(value: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(value)
    return total
