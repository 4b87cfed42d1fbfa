"""Which images a checkpoint is checked with."""

from __future__ import annotations

import torch
from torch import Tensor

from training.evaluation.canary import CANARY_IMAGES, choose_canary

IMAGES = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(-1, 3, 2, 2)  # each image shows its own number


def scores(best: Tensor, classes: int = 4) -> Tensor:
    """Probabilities (N, classes) with ``best`` for class N mod ``classes`` and the rest shared evenly."""
    rest = ((1 - best) / (classes - 1))[:, None].expand(-1, classes).clone()
    rest[torch.arange(len(best)), torch.arange(len(best)) % classes] = best
    return rest


def test_the_surest_images_of_every_class_are_taken() -> None:
    """Eight images of four classes are two of each, the surest first, with their own probabilities."""
    probabilities = scores(torch.linspace(0.8, 0.99, 60))
    canary = choose_canary(IMAGES, probabilities)
    assert canary is not None
    numbers = canary.images[:, 0, 0, 0].tolist()
    assert len(numbers) == CANARY_IMAGES
    assert sorted(numbers) == list(range(52, 60))
    assert torch.equal(torch.from_numpy(canary.probabilities), probabilities[numbers])


def test_an_image_that_another_precision_could_turn_is_not_taken() -> None:
    """Only images whose best class leads by half are known images, even if they are fewer than eight."""
    best = torch.full((60,), 0.6)
    best[[3, 10]] = 0.9
    canary = choose_canary(IMAGES, scores(best))
    assert canary is not None
    assert sorted(canary.images[:, 0, 0, 0].tolist()) == [3, 10]


def test_a_network_that_is_sure_of_nothing_has_no_canary() -> None:
    """Better no check than one that refuses a sound model."""
    assert choose_canary(IMAGES, scores(torch.full((60,), 0.4))) is None
