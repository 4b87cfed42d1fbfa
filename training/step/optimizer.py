"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from service.model.layers import Convolution, in_order
from service.model.network import Network
from training.recipes import Optimizer, Recipe


def make_optimizers(model: Network, recipe: Optimizer) -> list[torch.optim.Optimizer]:
    """Give every parameter of ``model`` to exactly one optimiser; each group's peak rate is its ``initial_lr``.

    The first group is of the last layer.
    """
    head = {id(parameter) for module in model.modules_of(model.layers[-1]) for parameter in module.parameters()}
    normed = {f"{layer.name}.weight" for layer in in_order(model.layers) if isinstance(layer, Convolution) and layer.norm}
    filters, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            plain.append(parameter)
        elif recipe.muon_learning_rate and name in normed and parameter.shape[2] > 1:
            filters.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {
            "params": [parameter for parameter in parameters if (id(parameter) in head) == of_head],
            "weight_decay": weight_decay,
            "lr": recipe.learning_rate * (1.0 if of_head else recipe.body_rate),
        }
        for of_head in (True, False)
        for parameters, weight_decay in ((decayed, recipe.weight_decay), (plain, 0.0))
    ]
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
            sgd(
                [_channels_last_order(parameter) for parameter in parameters],
                [_channels_last_order(parameter.grad) for parameter in parameters],
                [_channels_last_order(_momentum(self, parameter)) for parameter in parameters],
                fused=True,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )


def _momentum(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    return state["momentum_buffer"]


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
        """Update every filter from its gradient; filters of one shape together, which on a GPU is a sixth of the kernels."""
        for group in self.param_groups:
            for filters in _by_shape([parameter for parameter in group["params"] if parameter.grad is not None]):
                gradients = [parameter.grad for parameter in filters if parameter.grad is not None]
                buffers = [_momentum(self, parameter) for parameter in filters]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, gradients)
                updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
                # The order of a matrix's columns changes nothing but the order of the update's.
                moves = orthogonalised(torch.stack([_channels_last_order(update).flatten(1) for update in updates]))
                lengths = torch.stack(torch._foreach_norm(filters))
                for parameter, length, move in zip(filters, lengths, moves * -group["lr"], strict=True):
                    rows = _channels_last_order(parameter)
                    rows.mul_(len(parameter) ** 0.5 / length).add_(move.view(rows.shape))


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Part ``parameters`` into lists of one shape each."""
    parts: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        parts.setdefault(parameter.shape, []).append(parameter)
    return list(parts.values())


def orthogonalised(matrices: Tensor, steps: int = 3) -> Tensor:
    """Bring all singular values of each matrix of float (K, M, N) near 1 by the quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def learning_rate_factor(recipe: Recipe, progress: float) -> float:
    """Return the share of the peak learning rate at ``progress``, 0 at the first step and 1 after the last."""
    if progress < recipe.warmup:
        return max(progress / recipe.warmup, 0.01)
    rest = (progress - recipe.warmup) / (1 - recipe.warmup)
    return 1 - rest if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * rest))


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to ``factor`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
