"""How well typicality tells images of other things from those that a model knows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.data.dataset import Dataset

_SYNTHETIC_IMAGES = 500


@dataclass(frozen=True)
class Detection:
    """Shares of 0..1.

    ``auroc`` is the area under the receiver operating characteristic: how often an image of the data has the larger typicality
    of two, one of the data and one of another thing; equal ones count half. ``fpr95`` is the share of the other images that
    are at least as typical as 95 % of the data. ``flagged`` and ``data_flagged`` are below the threshold.
    """

    auroc: float
    fpr95: float
    flagged: float
    data_flagged: float


def detection(known: Tensor, unknown: Tensor, threshold: float) -> Detection:
    """Measure typicality of the data, float (N,), against that of other images, float (M,)."""
    known, unknown = known.double(), unknown.double()
    ordered = unknown.sort().values
    below, not_above = torch.searchsorted(ordered, known), torch.searchsorted(ordered, known, right=True)
    return Detection(
        auroc=float((below + not_above).double().mean() / (2 * len(unknown))),
        fpr95=float((unknown >= known.quantile(0.05)).double().mean()),
        flagged=float((unknown < threshold).double().mean()),
        data_flagged=float((known < threshold).double().mean()),
    )


def other_images(like: Dataset, unknown: Dataset | None = None) -> dict[str, Dataset]:
    """Return uniform noise and single colours of the size of ``like``, 500 images each, after ``unknown`` if it is given."""
    generator, size = torch.Generator().manual_seed(0), like.images.shape[-1]
    noise, colours = (
        torch.randint(0, 256, (_SYNTHETIC_IMAGES, 3, side, side), generator=generator, dtype=torch.uint8)
        .expand(-1, -1, size, size)
        .contiguous()
        for side in (size, 1)
    )
    bare = replace(like, labels=torch.zeros(_SYNTHETIC_IMAGES, dtype=torch.int64), paths=())
    device = like.images.device
    others = {} if unknown is None else {"images of other things": unknown.to(device)}
    return others | {
        name: replace(bare, images=images).to(device) for name, images in (("noise", noise), ("single colours", colours))
    }
