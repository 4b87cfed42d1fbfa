"""One update of the weights from a batch, in the fastest form for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.network import Network
from training.recipes import Recipe
from training.step.graphed_step import GraphedStep, Step
from training.step.parallel import Parallel
from training.step.teacher import Teacher


def make_step_function(
    model: Network,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    device: torch.device,
    parallel: Parallel,
    teacher: Teacher | None = None,
) -> Step:
    """Return the function that makes one update of what learns in ``model`` now, from a batch and its targets."""
    step: Step = partial(learn, parallel.distribute(model, device), optimizers=optimizers, recipe=recipe, teacher=teacher)
    if device.type == "cuda" and parallel.world_size == 1:
        return GraphedStep(step, model, optimizers)
    return step


def learn(
    forward: Callable[[Tensor], Tensor],
    batch: Tensor,
    targets: Tensor,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """Make one update from a batch of ``feed``. Return the mean loss, float32 (), and the logits, float (N, num_classes)."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = forward(batch)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    if teacher is not None:
        loss = teacher.loss(logits.float(), batch, hard=loss)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach(), logits.detach()


def let_learn(model: Network, *, head_alone: bool) -> None:
    """Let the last layer of ``model`` learn alone, or all layers; the statistics of norms follow the images either way."""
    head = {id(parameter) for module in model.modules_of(model.layers[-1]) for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(not head_alone or id(parameter) in head)
