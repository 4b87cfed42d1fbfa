"""Fitting typicality: what is like the training images, and what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.model.classifier import TypicalityTail
from service.model.typicality import Typicality
from training.evaluation.typicality import fit_from_features, threshold_of, turned


def features(count: int, seed: int, *, turned_share: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one of three directions, and which; of turned images with a share of a fourth one."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return 4 * torch.eye(8)[labels] + turned_share * torch.eye(8)[5] + 0.3 * torch.randn(count, 8, generator=random), labels


def fit(*, turned_share: float = 0.0, classes: int = 3) -> TypicalityTail:
    """Fit to 3,000 images and held-out ones."""
    turned_features = [features(3000, seed, turned_share=turned_share)[0] for seed in (3, 4)]
    held_out = features(3000, 1)[0]
    return TypicalityTail(fit_from_features(*features(3000, 0), classes, turned_features[0], held_out, turned_features[1]))


def test_one_in_twenty_held_out_like_images_is_below_005() -> None:
    """A conformal p-value: images like the held-out ones are below 0.05 one time in twenty, whatever the features."""
    typicality = fit()(features(3000, 2)[0]).flatten()
    assert 0.035 <= float((typicality < 0.05).float().mean()) <= 0.065
    assert 0.47 <= float(typicality.mean()) <= 0.53


@pytest.mark.parametrize("images", [9, 19, 20])
def test_few_held_out_images_flag_no_more_than_promised(images: int) -> None:
    """The p-value of n held-out images is a multiple of 1 / (n + 1), at least 1: below 0.05 it can only be from 20 on."""
    others, turned_features, turned_held_out = features(300, 2)[0], features(300, 3)[0], features(images, 4)[0]
    shares = []
    for seed in range(10, 20):
        held_out = features(images, seed)[0]
        typicality = TypicalityTail(fit_from_features(*features(300, 0), 3, turned_features, held_out, turned_held_out))(others)
        multiples = typicality * (images + 1)
        torch.testing.assert_close(multiples, multiples.round(), atol=1e-4, rtol=0)
        assert multiples.min() > 0.9
        shares.append(float((typicality < 0.05).float().mean()))
    assert np.mean(shares) <= 0.07 if images >= 20 else not any(shares)


def test_what_lies_between_the_classes_is_untypical() -> None:
    """A mixture of two classes, and a direction of no class, are less like the training images than any held-out one."""
    others = torch.stack([torch.eye(8)[0] + torch.eye(8)[1], torch.eye(8)[6]])
    assert fit()(others).max() <= 1 / 1001 + 1e-6


def test_what_looks_turned_is_less_typical() -> None:
    """The second term counts where turned images can be told from upright ones, and hardly where they cannot."""
    looks_turned = features(300, 5, turned_share=0.6)[0]
    assert fit(turned_share=0.6)(looks_turned).mean() < 0.5 * fit()(looks_turned).mean()


def test_a_class_without_training_images_has_a_mean() -> None:
    """The last class of a folder may have all its images in the validation part."""
    fitted: Typicality = fit_from_features(*features(300, 0), 5, *(features(300, seed)[0] for seed in (3, 1, 4)))
    assert fitted.weights.shape == (5, 8)
    assert np.isfinite(fitted.bias).all()


def test_turned_images_are_turned_by_quarters() -> None:
    """One, two, three quarters, and again."""
    images = torch.arange(4 * 3 * 2 * 2).view(4, 3, 2, 2)
    expected = [images[index].rot90(quarters, (1, 2)) for index, quarters in enumerate((1, 2, 3, 1))]
    torch.testing.assert_close(turned(images), torch.stack(expected))


@pytest.mark.parametrize(("images", "threshold"), [(5000, 0.05), (20, 0.05), (19, 0.075), (9, 0.15)])
def test_few_held_out_images_flag_what_is_stranger_than_all(images: int, threshold: float) -> None:
    """The smallest p-value is below the threshold, the second smallest is not, where the usual one would flag nothing."""
    assert threshold_of(images) == pytest.approx(threshold)
    assert 1 / (images + 1) < threshold_of(images)
