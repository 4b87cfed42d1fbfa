"""Folders of images that any network can tell apart: the data of the training program's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASS_NAMES = ("bars", "green", "red")  # sorted, as folders are read


def draw_image(label: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one image of a class, uint8 (H, W, 3), of a random size: red, green, or dark with bright bars."""
    height, width = rng.integers(36, 90, 2)
    image = rng.integers(0, 60, (height, width, 3))
    if label == "bars":
        image += (np.arange(width) // (width // 6) % 2 * 180)[None, :, None]
    else:
        image += np.array({"red": (190, 30, 30), "green": (30, 190, 30)}[label])
    return image.clip(0, 255).astype(np.uint8)


def write_classes(folder: Path, each: int, *, seed: int = 0, suffix: str = ".jpg") -> Path:
    """Write ``each`` images of every class to ``folder/<class>/``; give ``folder``."""
    rng = np.random.default_rng(seed)
    for label in CLASS_NAMES:
        (folder / label).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(draw_image(label, rng)).save(folder / label / f"{index:04d}{suffix}")
    return folder
