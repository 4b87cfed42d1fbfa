"""A network with the images as its last axis is the same network."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from service.model.architectures import ModelConfig
from training.recipes import find_recipe
from training.step.images_last import ImagesLastConv2d, use_cpu_form, use_images_last
from training.step.network import build_model

CHOICES: list[tuple[str, int, Literal["bf16", "fp32"], bool, bool]] = [
    ("resnet18", 16, "bf16", True, True),
    ("resnet18", 15, "bf16", True, False),
    ("resnet18", 64, "fp32", True, False),
    ("resnet18", 64, "bf16", False, False),
    ("resnet18-imagenet", 64, "bf16", True, False),
]


def test_values_gradients_statistics_and_names_are_those_of_the_plain_network() -> None:
    """A training step at 32 and at 24 pixels gives the same loss, gradients and running statistics."""
    for side in (24, 32):
        torch.manual_seed(0)
        config = ModelConfig()
        plain, turned = build_model("resnet18", config), build_model("resnet18", config)
        turned.load_state_dict(plain.state_dict())
        use_images_last(turned)
        assert sum(isinstance(module, ImagesLastConv2d) for module in turned.modules()) == 21
        images, labels = torch.randn(8, 3, side, side), torch.arange(8)
        for model in (plain, turned):
            logits = model(images)
            assert logits.shape == (8, config.num_classes)
            F.cross_entropy(logits, labels).backward()
        assert list(turned.state_dict()) == list(plain.state_dict())
        for (name, ours), torchs in zip(turned.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert torchs.grad is not None
            assert F.cosine_similarity(ours.grad.flatten(), torchs.grad.flatten(), dim=0) > 0.9999 or (
                torchs.grad.abs().max() < 1e-5  # a bias before a norm has no gradient but rounding
            ), name
        for statistic, expected in zip(turned.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(statistic, expected, rtol=1e-3, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(turned.eval()(images), plain.eval()(images), rtol=1e-3, atol=1e-3)


def test_autocast_computes_in_bfloat16() -> None:
    """Under autocast the convolutions are in bf16, and the weights' gradients stay float32."""
    model = build_model("resnet18", ModelConfig())
    use_images_last(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("architecture", "batch", "precision", "tiles", "turned"), CHOICES)
def test_it_is_chosen_where_it_is_faster(
    architecture: str,
    batch: int,
    precision: Literal["bf16", "fp32"],
    tiles: bool,
    turned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches that fill a tile take it, in bf16 on a processor with AMX, for images that shrink to a few pixels."""
    monkeypatch.setattr("training.step.images_last.has_any", lambda _flags: tiles)
    model = build_model(architecture, ModelConfig())
    use_cpu_form(model, replace(find_recipe("quick"), batch_size=batch, precision=precision))
    assert (ImagesLastConv2d in {type(module) for module in model.modules()}) == turned
