"""Images on disk to labelled uint8 tensors, decoded once by the service's own decoder.

Owns: folder layouts, class names, splits, unreadable files. Does not know: augmentation, devices, recipes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.errors import ServiceError
from service.images import InputSpec, decode_image

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})


class DataError(Exception):
    """A data folder that cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images: ``images`` uint8 (N, 3, size, size), RGB, 0..255; ``labels`` int64 (N,); on one device."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Dataset:
        """Give the same data on ``device``."""
        return Dataset(self.images.to(device), self.labels.to(device), self.class_names)

    def subset(self, indices: Tensor) -> Dataset:
        """Give the images at ``indices``, int64 (K,)."""
        return Dataset(self.images[indices], self.labels[indices], self.class_names)


def load_folder(folder: Path, spec: InputSpec, *, skip_unreadable: bool = False) -> Dataset:
    """Read ``folder/<class>/<image>``, classes and files in sorted order.

    Raises DataError when there is no such folder, when there are fewer than two classes, when a class is empty, and,
    unless ``skip_unreadable``, when files cannot be decoded; unreadable files are named either way.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds a folder of images for every class")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(class_folders) < 2:
        raise DataError(f"{folder} holds {len(class_folders)} class folders; at least 2 are needed, each named after its class")
    images: list[np.ndarray] = []
    labels: list[int] = []
    unreadable: list[str] = []
    for label, class_folder in enumerate(class_folders):
        before = len(images)
        for path in sorted(class_folder.iterdir()):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                continue
            try:
                images.append(decode_image(path.read_bytes(), spec))
                labels.append(label)
            except (ServiceError, OSError) as error:
                unreadable.append(f"{path}: {error}")
        if len(images) == before:
            raise DataError(f"{class_folder} holds no readable image; fill it or remove the folder")
    if unreadable and not skip_unreadable:
        shown = "\n  ".join(unreadable[:20])
        raise DataError(f"{len(unreadable)} files cannot be read (pass --skip-unreadable to go on without them):\n  {shown}")
    for line in unreadable:
        logger.warning("skipped %s", line)
    names = tuple(path.name for path in class_folders)
    return Dataset(torch.from_numpy(np.stack(images)), torch.tensor(labels), names)


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
