"""Images of the test set that are also in the training set, or nearly, or as mirror images: their accuracy is no test."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.dataset import Dataset, Source

logger = logging.getLogger(__name__)

_MOST_BITS = 4  # of 64 that may differ
_MOST_DIFFERENCE = 4.0  # mean over the pixels, of 255: hashes of flat images say little
_COMPARED_SIZE = 32
_SHOWN = 10
_AT_ONCE = 1000
_PIXELS_AT_ONCE = 1000 * 32 * 32


def warn_of_duplicates(source: Source) -> int:
    """Log which test images have a near-duplicate in train, by file name, and return their number.

    Data without files is not searched.
    """
    if not source.train.paths or not source.test.paths:
        return 0
    mirrored = near_duplicates(source.test.mirrored(), source.train)
    pairs = list({**dict(mirrored), **dict(near_duplicates(source.test, source.train))}.items())
    if pairs:
        names = [f"{source.test.paths[first]} is like {source.train.paths[second]}" for first, second in pairs[:_SHOWN]]
        more = [f"and {len(pairs) - _SHOWN} more"] if len(pairs) > _SHOWN else []
        logger.warning(
            "%d of %d test images are nearly the same as training images, or mirrored, so the test accuracy is too high:\n  %s",
            len(pairs),
            len(source.test),
            "\n  ".join(names + more),
        )
    return len(pairs)


def near_duplicates(first: Dataset, second: Dataset) -> list[tuple[int, int]]:
    """Return (index in ``first``, index of the most similar image in ``second``) for images that differ in compression only.

    Both the difference hash (N. Krawetz, "Kind of Like That", 2013) and the pixels have to agree.
    """
    ours, theirs = _hashes(first.images), _hashes(second.images)
    pairs = []
    for start in range(0, len(ours), _AT_ONCE):
        # Of bits as -1 and 1, a product of 64 - 2 d means d different bits.
        same = ours[start : start + _AT_ONCE] @ theirs.T >= ours.shape[1] - 2 * _MOST_BITS
        for row in same.any(1).nonzero().flatten().tolist():
            candidates = same[row].nonzero().flatten()
            image = _means(first.images[start + row : start + row + 1], _COMPARED_SIZE, _COMPARED_SIZE)
            others = _means(second.images[candidates], _COMPARED_SIZE, _COMPARED_SIZE)
            differences = (others - image).abs().flatten(1).mean(1)
            if differences.min() <= _MOST_DIFFERENCE:
                pairs.append((start + row, int(candidates[differences.argmin()])))
    return pairs


def _hashes(images: Tensor) -> Tensor:
    """Return 64 comparisons of neighbours in a row of 8 x 9 grey means as -1 and 1, float32 (N, 64)."""
    grey = _means(images, 8, 9).mean(1)
    return torch.where(grey[:, :, 1:] > grey[:, :, :-1], 1.0, -1.0).flatten(1)


def _means(images: Tensor, height: int, width: int) -> Tensor:
    """Return means over a grid, float32 (N, 3, height, width), of uint8 images (N, 3, H, W)."""
    batches = images.split(max(1, _PIXELS_AT_ONCE // images[0, 0].numel()))
    return torch.cat([F.adaptive_avg_pool2d(batch.float(), (height, width)) for batch in batches])
