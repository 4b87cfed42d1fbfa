"""A network with the images as its last axis is the same network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from service.model import ResNet18
from training.images_last import ImagesLastConv2d, has_amx, use_images_last


def test_values_gradients_statistics_and_names_are_those_of_the_plain_network() -> None:
    """A training step at 32 and at 24 pixels gives the same loss, gradients and running statistics."""
    for side in (24, 32):
        torch.manual_seed(0)
        plain, turned = ResNet18(), ResNet18()
        turned.load_state_dict(plain.state_dict())
        use_images_last(turned)
        assert sum(isinstance(module, ImagesLastConv2d) for module in turned.modules()) == 21
        images, labels = torch.randn(8, 3, side, side), torch.arange(8)
        for model in (plain, turned):
            logits = model(images)
            assert logits.shape == (8, 10)
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
    model = ResNet18()
    use_images_last(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_amx_is_read_from_the_processors_flags(tmp_path: Path) -> None:
    """Only the flag itself counts, and a machine without the file has none."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t: fpu amx_tile amx_bf16\n")
    assert has_amx(cpuinfo)
    cpuinfo.write_text("flags\t: fpu avx512_bf16\n")
    assert not has_amx(cpuinfo)
    assert not has_amx(tmp_path / "none")
