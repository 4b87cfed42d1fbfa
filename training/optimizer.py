"""Optimisers and the learning-rate schedule.

Owns: which parameter is updated how. Does not know: data, the loop, devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from training.recipes import Optimizer, Recipe


def make_optimizers(model: nn.Module, recipe: Optimizer) -> list[torch.optim.Optimizer]:
    """Give every parameter of ``model`` to exactly one optimiser; each group's peak rate is its ``initial_lr``."""
    filters, decayed, plain = [], [], []
    for parameter in model.parameters():
        if parameter.ndim < 2:
            plain.append(parameter)
        elif recipe.muon_learning_rate and parameter.ndim == 4 and parameter.shape[2] > 1:
            filters.append(parameter)  # 3x3: all of them are followed by a norm; projections and the head are not
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        FusedSGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True)
    ]
    if filters:
        optimizers.append(Muon(filters, lr=recipe.muon_learning_rate, momentum=recipe.muon_momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class FusedSGD(torch.optim.SGD):
    """Nesterov SGD in one pass over each weight, read in the order in which channels_last memory holds it.

    ``torch.optim.SGD(fused=True)`` makes that one pass too, but on a CPU it first copies every channels_last weight,
    gradient and momentum to the other order, and back: at batch 16 that is a fifth of a training step (30 ms against 10
    for 11 million weights on one core). The update is element by element, so its order does not change the values.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # we never take a closure
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            sgd(
                [_channels_last_order(parameter) for parameter in parameters],
                [_channels_last_order(parameter.grad) for parameter in parameters],
                [_channels_last_order(self.state[parameter]["momentum_buffer"]) for parameter in parameters],
                fused=True,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )


def _channels_last_order(tensor: Tensor) -> Tensor:
    """View filters (O, I, H, W) as (O, H, W, I), which is contiguous when they are channels_last; others as they are."""
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al., "Muon", 2024), for filters that a norm follows.

    Such a filter's length has no effect, so it is held at the square root of its output channels and ``lr`` is the
    relative length of a step (as in airbench94, Jordan 2024); no weight decay is needed.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # we never take a closure
        """Update every filter from its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer: Tensor = state["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                update = parameter.grad.add(buffer, alpha=group["momentum"])
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                parameter.add_(orthogonalised(update.flatten(1)).view(parameter.shape), alpha=-group["lr"])


def orthogonalised(matrix: Tensor, steps: int = 3) -> Tensor:
    """Bring all singular values of float (M, N) near 1 by the quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def learning_rate_factor(recipe: Recipe, progress: float) -> float:
    """Give the share of the peak learning rate at ``progress``, 0 at the first step and 1 after the last."""
    if progress < recipe.warmup:
        return max(progress / recipe.warmup, 0.01)
    rest = (progress - recipe.warmup) / (1 - recipe.warmup)
    return 1 - rest if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * rest))
