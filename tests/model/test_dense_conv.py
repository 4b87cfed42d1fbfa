"""Convolutions over tiny maps as matrix products: the same values, put in only where they fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.model.dense_conv import DenseConv2d, use_dense_convolutions
from service.model.network import ModelConfig, build_model


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (4, 4), (3, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_convolution_gives_the_same_values(stride: int, height: int, width: int, bias: bool) -> None:
    """For every stride and small shape, odd ones included."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias)
    images = torch.randn(3, 5, height, width)
    with torch.inference_mode():
        torch.testing.assert_close(DenseConv2d(conv, height, width)(images), conv(images), rtol=1e-4, atol=1e-5)


def test_only_tiny_maps_are_replaced_and_the_network_answers_the_same() -> None:
    """The last stage of the network for 32x32 images: four convolutions, and no other."""
    torch.manual_seed(0)
    network = build_model("resnet18", ModelConfig()).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network(images)
        use_dense_convolutions(network, images[:1])
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
    dense = [name for name, module in network.named_modules() if isinstance(module, DenseConv2d)]
    assert len(dense) == 4
    assert sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in network.modules()) == 13


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation": 2}, {"padding": 0}, {"padding_mode": "reflect"}, {"stride": (1, 2)}]
)
def test_other_convolutions_are_left_alone(options: dict[str, object]) -> None:
    """What the product does not cover keeps its own layer."""
    network = nn.Sequential(nn.Conv2d(4, 4, 3, **({"padding": 1} | options)))  # type: ignore[arg-type]
    use_dense_convolutions(network, torch.randn(1, 4, 3, 3))
    assert type(network[0]) is nn.Conv2d
