"""What a folder of images holds, by its names and its files' headers, before any image is decoded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import ServiceError
from service.image_files import read_file
from service.model.containers import walk
from service.model.formats import format_of
from training.data.folder import check_classes, class_folders, find_parts, image_paths
from training.errors import DataError

_MEASURED_FILES = 200


@dataclass(frozen=True)
class Survey:
    """``images`` counts all parts of the folder; ``side`` is the median of the shorter side in pixels, 0 if none is known."""

    images: int
    classes: int
    side: float


CIFAR10 = Survey(60_000, 10, 32.0)


def survey(folder: Path) -> Survey:
    """Count the images of ``folder`` and measure some; raise DataError as ``load_source`` does."""
    parts = find_parts(folder)
    folders = [found for part in parts.values() or [folder] for found in class_folders(part)]
    if not parts or "train" in parts:
        check_classes(parts.get("train", folder), sorted({name for name, _ in folders}), None)
    paths = [path for _, class_folder in folders for path in image_paths(class_folder)]
    if not paths:
        raise DataError(f"the class folders in {folder} hold no image; fill them")
    sides = shorter_sides(paths)
    return Survey(len(paths), len({name for name, _ in folders}), statistics.median(sides) if sides else 0.0)


def shorter_sides(paths: Sequence[Path]) -> list[int]:
    """Return the shorter side in pixels, from their headers, of up to about 200 of ``paths``, evenly taken."""
    sides = []
    for path in paths[:: max(1, len(paths) // _MEASURED_FILES)]:
        try:
            contents = read_file(path)
            container, _ = walk(format_of(contents), contents)
        except (OSError, ServiceError):  # damaged, or removed since it was found
            continue
        sides.append(min(container.width, container.height))
    return sides
