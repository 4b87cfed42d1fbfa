"""A folder of images to a data set, decoded once by the service's own decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from service.errors import ServiceError
from service.model.formats import IMAGE_SUFFIXES
from service.model.images import InputSpec, decode_image
from training.data.dataset import Dataset, Source
from training.errors import DataError

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2  # of a folder that has no test/ of its own
_SHOWN = 20


def load_source(folder: Path, spec: InputSpec, *, skip_unreadable: bool = False, split_seed: int = 0) -> Source:
    """Read ``folder/train/<class>/`` and ``folder/test/<class>/``, or split ``folder/<class>/`` into the two.

    The split holds out a fifth of every class by ``split_seed``. Raises DataError when the folder is neither, and
    whatever ``load_folder`` raises.
    """
    require_folder(folder)
    has_train, has_test = (folder / "train").is_dir(), (folder / "test").is_dir()
    if has_train != has_test:
        there, missing = ("train", "test") if has_train else ("test", "train")
        raise DataError(f"{folder} has {there}/ and no {missing}/; add it, or give {folder / there} to have it split")
    if not has_train:
        everything = load_folder(folder, spec, skip_unreadable=skip_unreadable)
        train, test = everything.split(round(len(everything) * TEST_SHARE), split_seed)
        if len(test.labels.unique()) < len(everything.class_names):
            raise DataError(f"{folder} has classes with too few images to hold a test image out; each needs at least 5")
        logger.info("%s has no test/: %d of its %d images are held out as the test set", folder, len(test), len(everything))
        return Source(train, test)
    train = load_folder(folder / "train", spec, skip_unreadable=skip_unreadable)
    test = load_folder(folder / "test", spec, skip_unreadable=skip_unreadable, class_names=train.class_names)
    return Source(train, test)


def load_folder(
    folder: Path, spec: InputSpec, *, skip_unreadable: bool = False, class_names: Sequence[str] | None = None
) -> Dataset:
    """Read ``folder/<class>/<image>``, classes and files in sorted order.

    ``class_names`` gives the classes of a model; the folder may then hold some of them only. Raises DataError when there
    is no such folder, when there are fewer than two classes (or ones that are not in ``class_names``), when a class is
    empty, and, unless ``skip_unreadable``, when files cannot be decoded; unreadable files are named either way.
    """
    names, folders = _class_folders(folder, class_names)
    images: list[np.ndarray] = []
    labels: list[int] = []
    paths: list[Path] = []
    unreadable: list[str] = []
    for class_folder in folders:
        before = len(images) + len(unreadable)
        for path in sorted(class_folder.iterdir()):
            if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                continue
            try:
                images.append(decode_image(path.read_bytes(), spec))
            except (ServiceError, OSError) as error:
                unreadable.append(f"{path}: {error}")
            else:
                labels.append(names.index(class_folder.name))
                paths.append(path)
        if len(images) + len(unreadable) == before:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{class_folder} holds no image ({suffixes}); fill it or remove the folder")
        if skip_unreadable and names.index(class_folder.name) not in labels:
            raise DataError(f"{class_folder} holds no readable image; fill it or remove the folder")
    if unreadable and not skip_unreadable:
        shown = "\n  ".join(unreadable[:_SHOWN]) + (
            f"\n  and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
        )
        raise DataError(f"{len(unreadable)} files cannot be read (pass --skip-unreadable to go on without them):\n  {shown}")
    for line in unreadable:
        logger.warning("skipped %s", line)
    return Dataset(torch.from_numpy(np.stack(images)), torch.tensor(labels), names, tuple(paths))


def require_folder(folder: Path) -> None:
    """Raise DataError unless ``folder`` is one that can be listed."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; give a folder that holds a folder of images for every class")


def _class_folders(folder: Path, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], list[Path]]:
    require_folder(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if class_names is None:
        if len(folders) < 2:
            count = "one class folder" if folders else "no class folders"
            raise DataError(f"{folder} holds {count}; at least 2 are needed, each named after its class")
        return tuple(path.name for path in folders), folders
    if not folders:
        raise DataError(f"{folder} holds no class folders; it needs one for each class, named after it")
    unknown = [path.name for path in folders if path.name not in class_names]
    if unknown:
        raise DataError(f"{folder} has classes that are not among {', '.join(class_names)}: {', '.join(unknown[:_SHOWN])}")
    return tuple(class_names), folders
