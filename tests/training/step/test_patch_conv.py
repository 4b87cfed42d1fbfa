"""A convolution as one matrix product is the same convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.model.architectures import ModelConfig
from service.model.network import build_model
from training.step.patch_conv import PatchConv2d, use_patch_convolutions


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 8])
def test_forward_and_gradients_are_those_of_a_convolution(stride: int, side: int) -> None:
    """For odd and even maps, below and above the size from which torch's own takes over, values and gradients agree."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, stride=stride, padding=1, bias=False)
    patches = PatchConv2d(6, 10, 3, stride=stride, padding=1, bias=False)
    patches.load_state_dict(conv.state_dict())
    results = []
    for layer in (conv, patches):
        x = torch.randn(4, 6, side, side, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        (y * torch.arange(y.numel()).view_as(y) / y.numel()).sum().backward()
        results.append((y, x.grad, layer.weight.grad))
    for ours, torchs in zip(*results, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_bfloat16() -> None:
    """Under autocast the product is in bf16, as torch's convolution is, and the weight's gradient stays float32."""
    conv = PatchConv2d(4, 4, 3, padding=1, bias=False)
    x = torch.randn(2, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


def test_a_network_keeps_its_values_and_its_names() -> None:
    """Swapping the convolutions of the whole network changes no name, no weight and no answer."""
    torch.manual_seed(0)
    model = build_model("resnet18", ModelConfig()).eval()
    images = torch.randn(2, 3, 32, 32)
    names = list(model.state_dict())
    with torch.inference_mode():
        before = model(images)
        use_patch_convolutions(model)
        after = model(images)
    assert list(model.state_dict()) == names
    assert sum(isinstance(module, PatchConv2d) for module in model.modules()) == 16
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2), bias=False),
    ],
    ids=["bias", "unpadded", "1x1", "groups", "dilation", "reflect", "strides"],
)
def test_any_other_convolution_is_left_alone(conv: nn.Conv2d) -> None:
    """What the substitution does not compute it does not touch."""
    model = nn.Sequential(conv)
    use_patch_convolutions(model)
    assert type(model[0]) is nn.Conv2d
