"""What an update changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.training.tiny_run import TINY
from training.recipes import Optimizer
from training.step.network import build_model
from training.step.optimizer import make_optimizers, set_learning_rates
from training.step.parallel import Parallel
from training.step.update import let_learn, make_step_function


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("optimizer", [TINY.optimizer, Optimizer(learning_rate=0.05, body_rate=0.2)], ids=["muon", "sgd"])
def test_the_head_learns_alone_and_then_all_layers_do(optimizer: Optimizer, device: str) -> None:
    """Only weights and bias of the last layer move in the first stage; in the second every weight does."""
    torch.manual_seed(0)
    recipe = replace(TINY, optimizer=optimizer)
    model = build_model("resnet18", recipe.config).to(device)
    optimizers = make_optimizers(model, optimizer)
    set_learning_rates(optimizers, 1.0)
    batch, targets = torch.randn(16, 3, 32, 32, device=device), torch.arange(16, device=device) % 10
    for head_alone in (True, False):
        let_learn(model, head_alone=head_alone)
        step = make_step_function(model, optimizers, recipe, torch.device(device), Parallel())
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        for _ in range(2):
            step(batch, targets)
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert {name for name in moved if name.startswith("head.")} == {"head.weight", "head.bias"}
        # A bias before a batch norm has no effect: its gradient is rounding.
        assert (before.keys() - moved <= {"stem.0.bias"}) is not head_alone
        assert (len(moved) == 2) is head_alone
