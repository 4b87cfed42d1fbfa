"""CIFAR-10 as torchvision downloads and verifies it."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from service.model.images import InputSpec, decode_image, encode_png
from training.data.dataset import Dataset, Source
from training.errors import DataError

logger = logging.getLogger(__name__)


def load_cifar10(folder: Path, spec: InputSpec, archive: type[CIFAR10] = CIFAR10) -> Source:
    """Read CIFAR-10 from ``folder``, downloaded first unless it is there; torchvision verifies every file's MD5.

    ``archive`` says what is downloaded from where. Raises DataError when it cannot be downloaded, verified or read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Source(
            train=_convert(archive(str(folder), train=True, download=True), spec),
            test=_convert(archive(str(folder), train=False, download=True), spec),
        )
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:  # no network, no space, damage
        raise DataError(
            f"cannot download CIFAR-10 to {folder}: {error}; or give --data a folder with train/<class>/ and test/<class>/"
        ) from error


def _convert(archive: CIFAR10, spec: InputSpec) -> Dataset:
    """``archive.data`` is uint8 (N, 32, 32, 3)."""
    if spec.size == archive.data.shape[1]:
        images = np.ascontiguousarray(archive.data.transpose(0, 3, 1, 2))
    else:  # as the service would take the same image in
        images = np.stack([decode_image(encode_png(image.transpose(2, 0, 1)), spec) for image in archive.data])
    return Dataset(torch.from_numpy(images), torch.tensor(archive.targets), tuple(archive.classes))
