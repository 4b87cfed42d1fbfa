"""Fitting typicality: what is like the training images, and what is not."""

from __future__ import annotations

import torch

from service.model.classifier import TypicalityTail
from training.evaluation.typicality import fit_from_features


def features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one of three directions, and which."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return 4 * torch.eye(8)[labels] + 0.3 * torch.randn(count, 8, generator=random), labels


def test_one_in_twenty_held_out_like_images_is_below_005() -> None:
    """A conformal p-value: images like the held-out ones are below 0.05 one time in twenty, whatever the features."""
    fitted = fit_from_features(*features(3000, 0), features(3000, 1)[0])
    typicality = TypicalityTail(fitted)(features(3000, 2)[0]).flatten()
    assert 0.035 <= float((typicality < 0.05).float().mean()) <= 0.065
    assert 0.47 <= float(typicality.mean()) <= 0.53


def test_what_lies_between_the_classes_is_untypical() -> None:
    """A mixture of two classes, and a direction of no class, are less like the training images than any held-out one."""
    fitted = fit_from_features(*features(3000, 0), features(3000, 1)[0])
    others = torch.stack([torch.eye(8)[0] + torch.eye(8)[1], torch.eye(8)[6]])
    assert TypicalityTail(fitted)(others).max() == 0
