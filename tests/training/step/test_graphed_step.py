"""A training step as a CUDA graph does what it does kernel by kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.training.tiny_run import TINY
from training.recipes import Optimizer, Recipe
from training.step.graphed_step import GraphedStep
from training.step.network import build_model
from training.step.optimizer import make_optimizers, set_learning_rates
from training.step.update import learn

pytestmark = pytest.mark.gpu

SGD = replace(TINY, precision="fp32", optimizer=Optimizer(learning_rate=0.05))
MUON = replace(TINY, precision="fp32")


def run(recipe: Recipe, *, graphed: bool) -> tuple[list[float], list[Tensor]]:
    """Make twelve steps at changing rates, over two image sizes and both forms of targets; give losses and the state."""
    torch.manual_seed(0)
    model = build_model("resnet18", recipe.config).to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = make_optimizers(model, recipe.optimizer)
    step = partial(learn, model, optimizers=optimizers, recipe=recipe)
    make_step = GraphedStep(step, model, optimizers) if graphed else step
    generator = torch.Generator("cuda").manual_seed(1)
    losses = []
    for number in range(12):
        side = 24 if number % 3 == 0 else 32
        batch = torch.randn(16, 3, side, side, device="cuda", generator=generator)
        targets = torch.randint(10, (16,), device="cuda", generator=generator)
        if number % 2:
            targets = torch.nn.functional.one_hot(targets, 10).float() * 0.8 + 0.02
        set_learning_rates(optimizers, (number + 1) / 12)
        loss, _ = make_step(batch.contiguous(memory_format=torch.channels_last), targets)
        losses.append(loss.item())
    momentum = [state["momentum_buffer"] for optimizer in optimizers for state in optimizer.state.values()]
    return losses, [*model.state_dict().values(), *momentum]


@pytest.mark.parametrize("recipe", [SGD, MUON], ids=["sgd", "muon"])
def test_a_graph_makes_the_same_steps(recipe: Recipe) -> None:
    """Losses, weights, statistics and momentum are those of the same steps without a graph, whatever the rate was captured."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        losses, state = run(recipe, graphed=True)
        expected_losses, expected_state = run(recipe, graphed=False)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for value, expected in zip(state, expected_state, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-3)
