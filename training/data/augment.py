"""Augmentation of a whole batch at once on the device it lies on, drawn anew for every image.

Randomness comes from torch's default generators, which the loop seeds for every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from service.model.images import InputSpec
from training.recipes import RECIPE_SIZE, Augmentation


def normalise(images: Tensor, spec: InputSpec) -> Tensor:
    """Map uint8 (N, 3, H, W), 0..255, to float32 of that shape in channels_last: ``(pixel / 255 - mean) / std``."""
    mean = torch.tensor(spec.mean, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(spec.std, device=images.device).view(3, 1, 1) * 255
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, spec: InputSpec, recipe: Augmentation, size: int) -> Tensor:
    """Return the training form of uint8 images (N, 3, H, W): float32 (N, 3, size, size), normalised, channels_last."""
    if recipe.crop_padding or recipe.flip_p:
        images = crop_and_flip(images, round(recipe.crop_padding * images.shape[-1] / RECIPE_SIZE), recipe.flip_p)
    batch = normalise(images, spec)
    if recipe.crop_area:
        batch = resized_crop(batch, recipe.crop_area)
    if recipe.affine_p:
        batch = affine(batch, recipe)
    if size != batch.shape[-1]:
        batch = F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        batch = batch.contiguous(memory_format=torch.channels_last)
    if recipe.erase_size:
        batch = erase(batch, max(1, round(recipe.erase_size * size / RECIPE_SIZE)))
    return batch


def crop_and_flip(images: Tensor, padding: int, flip_p: float) -> Tensor:
    """Shift each image by up to ``padding`` pixels, its border reflected, and flip it with probability ``flip_p``.

    Takes and gives (N, C, H, W) of any dtype; one gather, no padded copy.
    """
    count, channels, height, width = images.shape
    device = images.device
    rows = _reflected(torch.randint(-padding, padding + 1, (count, 1), device=device), height)
    columns = _reflected(torch.randint(-padding, padding + 1, (count, 1), device=device), width)
    flipped = torch.rand(count, 1, device=device) < flip_p
    columns = torch.where(flipped, columns.flip(1), columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1).expand(-1, channels, -1)
    return images.reshape(count, channels, -1).gather(2, index).view_as(images)


def _reflected(offset: Tensor, length: int) -> Tensor:
    """Positions ``offset .. offset + length`` in a row of ``length``, mirrored at both ends; int64 (N, length)."""
    position = (offset + torch.arange(length, device=offset.device)).abs()
    return length - 1 - (length - 1 - position).abs()


def affine(batch: Tensor, recipe: Augmentation) -> Tensor:
    """Rotate, scale and shift a random share of the images, float (N, 3, H, W); what comes in from outside is the mean."""
    chosen = (torch.rand(len(batch), device=batch.device) < recipe.affine_p).nonzero().flatten()
    count = len(chosen)
    if not count:  # of 16 images at p 0.2 this is one batch in 36, and torch makes no empty grid
        return batch
    draw = torch.rand(4, count, device=batch.device)
    angle = (draw[0] * 2 - 1) * recipe.affine_degrees * (torch.pi / 180)
    low, high = recipe.affine_scale
    scale = 1 / (low + draw[1] * (high - low))
    shift = (draw[2:] * 2 - 1) * recipe.affine_translate * 2  # the grid spans -1..1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(matrix, [count, *batch.shape[1:]], align_corners=False)
    moved = F.grid_sample(batch[chosen], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return batch.index_copy(0, chosen, moved)


def resized_crop(batch: Tensor, least_area: float) -> Tensor:
    """Scale a part of each image, of ``least_area`` to all of it and 3:4 to 4:3 in shape, to its size; float (N, 3, H, W)."""
    draw = torch.rand(4, len(batch), device=batch.device)
    area = least_area + draw[0] * (1 - least_area)
    root = ((draw[1] * 2 - 1) * math.log(4 / 3) / 2).exp()  # of width / height
    width, height = (area.sqrt() * root).clamp(max=1), (area.sqrt() / root).clamp(max=1)
    left, top = (draw[2] * 2 - 1) * (1 - width), (draw[3] * 2 - 1) * (1 - height)
    zero = torch.zeros_like(width)
    matrix = torch.stack([torch.stack([width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)
    grid = F.affine_grid(matrix, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)


def erase(batch: Tensor, side: int) -> Tensor:
    """Set a square of ``side`` pixels at a random place to 0, the mean colour; in place, float (N, 3, H, W)."""
    count, _, height, width = batch.shape
    top = torch.randint(0, height - side + 1, (count, 1, 1, 1), device=batch.device)
    left = torch.randint(0, width - side + 1, (count, 1, 1, 1), device=batch.device)
    rows = torch.arange(height, device=batch.device).view(1, 1, -1, 1) - top
    columns = torch.arange(width, device=batch.device).view(1, 1, 1, -1) - left
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return batch.masked_fill_(inside, 0.0)


def mix(batch: Tensor, labels: Tensor, recipe: Augmentation, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix images with one another; return batch and targets: float (N, num_classes), or int64 (N,) if none were mixed."""
    mixers: list[v2.Transform] = []
    if recipe.mixup_alpha:
        mixers.append(v2.MixUp(alpha=recipe.mixup_alpha, num_classes=num_classes))
    if recipe.cutmix_alpha:
        mixers.append(v2.CutMix(alpha=recipe.cutmix_alpha, num_classes=num_classes))
    # Nothing is drawn where every batch is mixed: such recipes' random numbers stay those of their published runs.
    if not mixers or (recipe.mix_p < 1 and torch.rand(()) >= recipe.mix_p):
        return batch, labels
    mixed, targets = mixers[int(torch.randint(len(mixers), ()))](batch, labels)
    return mixed, targets
