"""Labelled images in memory, and how they are divided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Dataset:
    """Labelled images: ``images`` uint8 (N, 3, size, size), RGB, 0..255; ``labels`` int64 (N,); on one device.

    ``paths`` names the file of each image, in the same order; it is empty where images do not come from files of their own.
    ``left_out`` counts the files of the folder that are not used, by reason; parts of a data set do not repeat it.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    paths: tuple[Path, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def imbalance(self) -> float:
        """Images of the largest class for one of the smallest; classes without images do not count."""
        counts = torch.bincount(self.labels)
        return float(counts.max() / counts[counts > 0].min())

    def to(self, device: torch.device) -> Dataset:
        """Return the same data on ``device``."""
        return Dataset(self.images.to(device), self.labels.to(device), self.class_names, self.paths)

    def subset(self, indices: Tensor) -> Dataset:
        """Return the images at ``indices``, int64 (K,)."""
        indices = indices.to(self.images.device)
        paths = tuple(self.paths[index] for index in indices.tolist()) if self.paths else ()
        return Dataset(self.images[indices], self.labels[indices], self.class_names, paths)

    def centred(self, pixels: int) -> Dataset:
        """Return the inner ``pixels`` of each side, scaled up (bilinear) to the same size: what closer framing does."""
        border = (self.images.shape[-1] - pixels) // 2
        if border < 0 or pixels < 1:
            raise ValueError(f"the centre of these images has 1 to {self.images.shape[-1]} pixels, not {pixels}")
        centre = self.images[..., border : border + pixels, border : border + pixels].float()
        images = functional.interpolate(centre, size=self.images.shape[-2:], mode="bilinear")
        return replace(self, images=images.round().byte())

    def mirrored(self) -> Dataset:
        """Return the horizontal mirror images, which have no files."""
        return replace(self, images=self.images.flip(-1), paths=())

    def split(self, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
        """Return what is kept and what is held out, as ``stratified_split`` divides it."""
        kept, held = stratified_split(self.labels, held_out, seed)
        return self.subset(kept), self.subset(held)


@dataclass(frozen=True)
class Source:
    """What a run trains on, is validated on, and at its end is tested on.

    ``validation`` is None where it is held out of ``train``. ``left_out`` counts unused files by reason.
    """

    train: Dataset
    test: Dataset
    validation: Dataset | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    def divided(self, validation_images: int, seed: int) -> tuple[Dataset, Dataset]:
        """Return training and validation images: those of the data, or ``validation_images`` held out of train by ``seed``."""
        if self.validation is not None:
            return self.train, self.validation
        return self.train.split(validation_images, seed)

    def digest(self) -> str:
        """Return a digest of which files are in which part and class, and their sizes; empty where images have no files."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        files = [
            (name, data.class_names[label], path.name, path.stat().st_size)
            for name, data in parts.items()
            if data is not None
            for label, path in zip(data.labels.tolist(), data.paths, strict=bool(data.paths))
        ]
        return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest() if files else ""


def stratified_split(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (kept, held out), the same share of every class to within one image, by ``seed``.

    ``labels`` is int64 (N,); both results are sorted int64 on the CPU. A class keeps at least one image.
    """
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    held: list[Tensor] = []
    for indices, count in zip(_by_class(labels), _shares(labels, held_out), strict=True):
        order = torch.randperm(len(indices), generator=generator)
        held.append(indices[order[:count]])
    held_indices = torch.cat(held).sort().values
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[held_indices] = False
    return keep.nonzero().flatten(), held_indices


def _by_class(labels: Tensor) -> Sequence[Tensor]:
    return [(labels == label).nonzero().flatten() for label in range(int(labels.max()) + 1)]


def _shares(labels: Tensor, held_out: int) -> list[int]:
    """Largest remainders, so that the shares add up to ``held_out`` where the classes allow it."""
    counts = torch.bincount(labels)
    exact = counts.double() * held_out / len(labels)
    shares = exact.floor().long()
    for label in (exact - shares).argsort(descending=True)[: held_out - int(shares.sum())].tolist():
        shares[label] += 1
    return torch.minimum(shares, (counts - 1).clamp(min=0)).tolist()
