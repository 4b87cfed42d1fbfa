"""Augmentation draws anew for every image, and changes an image only as its recipe says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.images import InputSpec
from training.data.augment import affine, augment, crop_and_flip, erase, mix, normalise, resized_crop
from training.recipes import Augmentation

SPEC = InputSpec()


@pytest.fixture
def images() -> Tensor:
    """uint8 (64, 3, 32, 32), every pixel drawn by chance, so that no two places look alike."""
    return torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_normalise_maps_the_mean_colour_to_zero() -> None:
    """A pixel is ``(pixel / 255 - mean) / std`` of its own channel, in channels_last."""
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 4, 3)
    result = normalise(pixels, SPEC)
    mean, std = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
    for column, value in enumerate((0, 128, 255)):
        torch.testing.assert_close(result[0, :, 0, column], (value / 255 - mean) / std)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_no_augmentation_is_only_normalisation(images: Tensor) -> None:
    """A recipe with everything at zero gives what the network sees when it serves."""
    torch.testing.assert_close(augment(images, SPEC, Augmentation(), 32), normalise(images, SPEC), rtol=0, atol=0)


@pytest.mark.parametrize("flip_p", [0.0, 1.0])
def test_a_crop_is_a_window_of_the_reflected_image(images: Tensor, flip_p: float) -> None:
    """Each result is found in its own image with reflected borders, at exactly one place, flipped if it was to be."""
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32)
    result = crop_and_flip(images, 4, flip_p)
    result = result.flip(-1) if flip_p else result
    same = (windows == result[:, :, None, None]).all(-1).all(-1).all(1)
    assert same.sum((1, 2)).tolist() == [1] * len(images)
    places = same.flatten(1).int().argmax(1)
    assert len(places.unique()) > 20, "64 images should be cut at many of the 81 places"


def test_flips_are_as_frequent_as_asked(images: Tensor) -> None:
    """With probability 0.2 about a fifth of many images is mirrored, and the others stay as they are."""
    many = images.repeat(100, 1, 1, 1)
    result = crop_and_flip(many, 0, 0.2)
    flipped = (result == many.flip(-1)).flatten(1).all(1)
    kept = (result == many).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 0.18 < flipped.double().mean().item() < 0.22  # four standard deviations of 6,400 draws


def test_an_affine_of_nothing_is_the_identity(images: Tensor) -> None:
    """Without rotation, scale and shift the image comes back."""
    recipe = Augmentation(affine_p=1.0, affine_degrees=0.0, affine_translate=0.0, affine_scale=(1.0, 1.0))
    batch = normalise(images, SPEC)
    torch.testing.assert_close(affine(batch, recipe), batch, atol=1e-4, rtol=1e-4)


def test_a_resized_crop_shows_a_part_of_its_image() -> None:
    """Of an image whose values are its coordinates, the spans of a crop are its sides: their product is the area."""
    ramp = torch.linspace(0, 1, 32)
    columns = ramp.expand(200, 1, 32, 32)
    batch = torch.cat([columns, columns.mT, columns], 1)
    cut = resized_crop(batch, 0.25)
    width = cut[:, 0].amax((1, 2)) - cut[:, 0].amin((1, 2))
    height = cut[:, 1].amax((1, 2)) - cut[:, 1].amin((1, 2))
    area, shape = width * height, width / height
    assert area.min() > 0.2
    assert area.max() <= 1
    assert 0.7 < shape.min() < 0.9 < 1.1 < shape.max() < 1.4
    torch.testing.assert_close(resized_crop(batch, 1.0).mean(), batch.mean(), atol=0.02, rtol=0)


def test_a_rotation_by_a_quarter_turns_the_image() -> None:
    """The angle is in degrees: the largest of ten thousand draws up to 90 is very nearly a quarter turn."""
    recipe = Augmentation(affine_p=1.0, affine_degrees=90.0, affine_translate=0.0, affine_scale=(1.0, 1.0))
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., :4, :4] = 1.0
    turned = affine(corner.repeat(10_000, 1, 1, 1), recipe)
    for quarter in (1, 3):
        nearest = (turned - torch.rot90(corner, quarter, (2, 3))).abs().mean((1, 2, 3)).min()
        assert nearest < 0.01
    assert (turned - torch.rot90(corner, 2, (2, 3))).abs().mean((1, 2, 3)).min() > 0.3


def test_an_affine_moves_the_share_of_images_it_is_asked_to(images: Tensor) -> None:
    """With probability 0.2 about a fifth of many images moves; the others are the same to the bit."""
    batch = normalise(images.repeat(50, 1, 1, 1), SPEC)
    moved = (affine(batch, Augmentation(affine_p=0.2)) != batch).flatten(1).any(1)
    assert 0.17 < moved.double().mean().item() < 0.23  # four standard deviations of 3,200 draws


def test_a_batch_of_which_no_image_moves_is_the_same() -> None:
    """In small batches it happens that the draw takes no image at all."""
    batch = torch.rand(2, 3, 8, 8)
    recipe = Augmentation(affine_p=0.2)
    moved = [not torch.equal(affine(batch, recipe), batch) for _ in range(50)]
    assert True in moved
    assert False in moved


def test_erasing_sets_one_square_to_the_mean_colour() -> None:
    """Each image loses one square of the given side, at its own place, in all channels."""
    result = erase(torch.ones(64, 3, 32, 32), 10)
    assert (result == 0).sum((1, 2, 3)).tolist() == [300] * 64
    rows, columns = (result[:, 0] == 0).any(2), (result[:, 0] == 0).any(1)
    assert rows.sum(1).tolist() == columns.sum(1).tolist() == [10] * 64
    places = rows.int().argmax(1) * 32 + columns.int().argmax(1)
    assert len(places.unique()) > 40


@pytest.mark.parametrize(("side", "size", "erased"), [(32, 32, 8), (32, 24, 6), (64, 64, 16), (64, 48, 12)])
def test_pixels_grow_with_the_image(side: int, size: int, erased: int) -> None:
    """A recipe's pixels are of a 32-pixel image: at another input size, or while images are small, they scale."""
    white = torch.full((4, 3, side, side), 255, dtype=torch.uint8)
    result = augment(white, SPEC, Augmentation(erase_size=8), size)
    assert result.shape == (4, 3, size, size)
    assert (result == 0).sum((1, 2, 3)).tolist() == [3 * erased**2] * 4


@pytest.mark.parametrize(
    "recipe",
    [Augmentation(mixup_alpha=0.2), Augmentation(cutmix_alpha=1.0), Augmentation(mixup_alpha=0.2, cutmix_alpha=1.0)],
)
def test_mixing_shares_the_targets_as_it_shares_the_pixels(recipe: Augmentation) -> None:
    """In images of one colour for each class, the share of a class's pixels is its share of the target."""
    labels = torch.arange(4)
    batch = F.one_hot(labels, 4).float()[:, :, None, None].expand(-1, -1, 32, 32).contiguous()  # channel = class
    shared = 0
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = mix(batch, labels, recipe, 4)
        torch.testing.assert_close(mixed.mean((2, 3)), targets, atol=1e-5, rtol=0)
        shared += int((targets.max(1).values < 0.99).any())
    assert shared > 0


def test_a_share_of_the_batches_is_mixed() -> None:
    """With ``mix_p`` a half, about half of the batches keep their labels, and the others are mixed."""
    batch, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    torch.manual_seed(0)
    mixed = sum(mix(batch, labels, Augmentation(cutmix_alpha=1.0, mix_p=0.5), 4)[1].is_floating_point() for _ in range(200))
    assert 70 < mixed < 130


def test_without_mixing_the_labels_come_back(images: Tensor) -> None:
    """Targets stay class numbers where no recipe mixes them."""
    labels = torch.arange(64)
    batch, targets = mix(images.float(), labels, Augmentation(), 64)
    assert batch.shape == images.shape
    assert targets is labels


def test_the_same_seed_gives_the_same_batch_and_another_another(images: Tensor) -> None:
    """Augmentation depends on torch's seed and on nothing else."""
    recipe = Augmentation(flip_p=0.5, crop_padding=4, affine_p=0.5, erase_size=8)
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(augment(images, SPEC, recipe, 24))
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_the_original_images_stay_as_they_are(images: Tensor) -> None:
    """The data set lies in memory once; augmenting a batch of it must not write to it."""
    before = images.clone()
    recipe = Augmentation(flip_p=0.5, crop_padding=4, affine_p=0.5, erase_size=8)
    augment(images, SPEC, recipe, 32)
    augment(images, SPEC, replace(recipe, crop_padding=0, flip_p=0.0), 32)
    assert torch.equal(images, before)
