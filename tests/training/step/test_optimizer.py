"""Which parameter is updated how."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.model.architectures import ModelConfig
from service.model.layers import Convolution, Linear, Mean
from service.model.network import Network
from training.recipes import Optimizer
from training.step.network import build_model
from training.step.optimizer import FusedSGD, Muon, make_optimizers, orthogonalised

SMALL = ModelConfig(stem_width=8, widths=(8, 16), depths=(1, 1))
SGD = Optimizer(learning_rate=0.1, weight_decay=5e-4)
WITH_MUON = Optimizer(learning_rate=0.1, weight_decay=5e-4, muon_learning_rate=0.2)


@pytest.mark.parametrize("recipe", [SGD, WITH_MUON], ids=["sgd", "muon"])
def test_every_parameter_is_updated_by_exactly_one_optimiser(recipe: Optimizer) -> None:
    """No parameter is left out, and none is moved twice in a step."""
    model = build_model("resnet18", SMALL)
    owned = [
        id(value)
        for optimizer in make_optimizers(model, recipe)
        for group in optimizer.param_groups
        for value in group["params"]
    ]
    assert sorted(owned) == sorted(id(value) for value in model.parameters())


@pytest.mark.parametrize("recipe", [SGD, WITH_MUON], ids=["sgd", "muon"])
def test_norms_and_biases_do_not_decay(recipe: Optimizer) -> None:
    """Weight decay is for the weights of convolutions only."""
    model = build_model("resnet18", SMALL)
    decays = {
        id(value): group.get("weight_decay", 0.0)
        for optimizer in make_optimizers(model, recipe)
        for group in optimizer.param_groups
        for value in group["params"]
    }
    for name, value in model.named_parameters():
        if value.ndim == 1:
            assert decays[id(value)] == 0.0, name
    assert decays[id(model.get_parameter("head.weight"))] == 5e-4


def test_a_filter_without_a_norm_is_not_muons() -> None:
    """Muon holds a filter at one length, which only a norm after it makes harmless."""
    first = Convolution("features.0", 3, 4, kernel=3, bias=True, relu="features.1")
    second = Convolution("features.2", 4, 4, kernel=3, norm="features.3", relu="features.4")
    model = Network((first, second, Mean("pool"), Linear("head", 4, 3)))
    (muon,) = [optimizer for optimizer in make_optimizers(model, WITH_MUON) if isinstance(optimizer, Muon)]
    assert [id(value) for value in muon.param_groups[0]["params"]] == [id(model.get_parameter("features.2.weight"))]


def test_all_layers_but_the_last_learn_at_their_own_rate() -> None:
    """A fifth of the head's, which is the recipe's."""
    model = build_model("resnet18", SMALL)
    (optimizer,) = make_optimizers(model, Optimizer(learning_rate=0.1, body_rate=0.2))
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for name, value in model.named_parameters():
        assert rates[id(value)] == pytest.approx(0.1 if name.startswith("head.") else 0.02), name


def test_sgd_moves_channels_last_weights_as_torch_does() -> None:
    """Weights, momentum and a state saved half way are those of ``torch.optim.SGD``, and the weights stay channels_last."""
    results = []
    for kind in (torch.optim.SGD, FusedSGD):
        torch.manual_seed(0)
        filters, bias = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(8)
        parameters = [nn.Parameter(filters), nn.Parameter(bias), nn.Parameter(torch.ones(2))]  # the last has no gradient
        optimizer = kind(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for step in range(6):
            if step == 3:
                state = optimizer.state_dict()
                optimizer = kind(parameters, lr=0.5)
                optimizer.load_state_dict(state)
            for parameter in parameters[:2]:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        assert parameters[0].is_contiguous(memory_format=torch.channels_last)
        results.append([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(*results)


def test_muon_takes_the_filters_that_a_norm_follows() -> None:
    """The 3x3 filters are Muon's; the projections, which nothing normalises, and the head are SGD's."""
    model = build_model("resnet18", SMALL)
    muon = next(optimizer for optimizer in make_optimizers(model, WITH_MUON) if isinstance(optimizer, Muon))
    taken = {id(value) for value in muon.param_groups[0]["params"]}
    names = {name for name, value in model.named_parameters() if id(value) in taken}
    assert names == {"stem.0.weight"} | {f"stages.{stage}.0.conv{number}.weight" for stage in (0, 1) for number in (1, 2)}


@pytest.mark.parametrize("shape", [(16, 72), (72, 16), (32, 32)])
def test_orthogonalising_brings_the_singular_values_near_one(shape: tuple[int, int]) -> None:
    """Five steps of the iteration leave all singular values between 0.6 and 1.3, whatever they were, and keep the signs."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    matrices = torch.stack([matrix, -100 * matrix])
    result = orthogonalised(matrices, steps=5)
    values = torch.linalg.svdvals(result.float())
    assert result.shape == matrices.shape
    assert values.min() > 0.5
    assert values.max() < 1.4
    assert ((result * matrices).sum((1, 2)) > 0).all(), "a step still goes downhill"


def test_filters_of_one_shape_are_updated_as_if_alone() -> None:
    """Muon puts them together for speed only; each keeps its own length, momentum and direction."""
    results = []
    for alone in (False, True):
        torch.manual_seed(0)
        filters = [nn.Parameter(torch.randn(16, 8, 3, 3) * 3.0**number) for number in range(3)]
        together = [Muon(part, lr=0.1, momentum=0.6) for part in ([[one] for one in filters] if alone else [filters])]
        for _ in range(3):
            for parameter in filters:
                parameter.grad = torch.randn(16, 8, 3, 3)
            for optimizer in together:
                optimizer.step()
        results.append([parameter.detach() for parameter in filters])
    torch.testing.assert_close(*results, rtol=0.02, atol=0.01)  # bfloat16, summed in another order


def test_muon_holds_the_length_of_a_filter() -> None:
    """A step starts from the filter at its length, the square root of its output channels, and moves it by the rate."""
    filters = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    direction = filters.detach() / filters.detach().norm()
    filters.grad = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    Muon([filters], lr=0.0, momentum=0.6).step()
    torch.testing.assert_close(filters.detach(), direction * 4.0)
    Muon([filters], lr=0.1, momentum=0.6).step()
    # Sixteen singular values near 1 make a step of length near 4, a tenth of which is 0.4.
    assert 0.2 < (filters.detach() - direction * 4.0).norm() < 0.6


def test_muon_finds_a_minimum() -> None:
    """On a convex problem whose answer has the length that Muon holds, the loss falls to a small part."""
    torch.manual_seed(0)
    target = torch.randn(8, 4, 3, 3)
    target *= len(target) ** 0.5 / target.norm()
    filters = nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = Muon([filters], lr=0.1, momentum=0.6)
    losses = []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 100)
        loss = (filters - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[1]


def test_a_saved_optimiser_goes_on_as_it_would_have() -> None:
    """The state that is saved is all there is: momentum and rates."""
    results = []
    for reload in (False, True):
        torch.manual_seed(0)
        filters = nn.Parameter(torch.randn(8, 4, 3, 3))
        optimizer = Muon([filters], lr=0.1, momentum=0.6)
        for step in range(4):
            if reload and step == 2:
                state = optimizer.state_dict()
                optimizer = Muon([filters], lr=0.5, momentum=0.1)
                optimizer.load_state_dict(state)
            filters.grad = torch.randn(8, 4, 3, 3)
            optimizer.step()
        results.append(filters.detach())
    assert torch.equal(*results)
