"""A folder of images to a data set, decoded once by the service's own decoder."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from service.cpu import available_cores
from service.errors import ServiceError
from service.image_files import read_file
from service.model.checkpoint import CheckpointMetadata
from service.model.formats import IMAGE_SUFFIXES
from service.model.images import InputSpec, decode_image
from training.data.dataset import Dataset, Source
from training.errors import DataError

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2  # of a folder that has no test/ of its own
_UNREADABLE_SHARE = 0.1  # of the files; more is a mistake, such as a copy that was cut short
_SHOWN = 20
_SHOWN_FROM = 1000  # files, whose reading takes seconds
_PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def load_source(folder: Path, spec: InputSpec, *, skip_unreadable: bool = False, split_seed: int = 0) -> Source:
    """Read ``folder/train/`` with ``test/`` or a validation folder, or split ``folder/<class>/`` into train and test.

    With both, validation images are taken from their own folder; a validation folder alone is the test set. The split holds
    out a fifth of every class by ``split_seed``. Raises DataError when the folder is neither, and whatever ``load_folder``
    raises.
    """
    parts = find_parts(folder)
    for there, missing in (("test", "train"), ("train", "test")):
        if there in parts and missing not in parts:
            raise DataError(f"{folder} has {there}/ and no {missing}/; add it, or give {parts[there]} to have it split")
    if not parts:
        everything = load_folder(folder, spec, skip_unreadable=skip_unreadable)
        source = hold_out_test(everything, split_seed)
        test, tested = source.test, set(source.test.labels.tolist())
        if few := [name for label, name in enumerate(everything.class_names) if label not in tested]:
            raise DataError(f"too few images of {', '.join(few[:_SHOWN])} to hold one out for the test; each needs at least 5")
        logger.info("%s has no test/: %d of its %d images are held out as the test set", folder, len(test), len(everything))
        return source
    train = load_folder(parts["train"], spec, skip_unreadable=skip_unreadable)
    others = {
        name: load_folder(path, spec, skip_unreadable=skip_unreadable, class_names=train.class_names)
        for name, path in parts.items()
        if name != "train"
    }
    left_out = sum((Counter(data.left_out) for data in (train, *others.values())), Counter[str]())
    return Source(train, **others, left_out=left_out)


def hold_out_test(everything: Dataset, split_seed: int) -> Source:
    """Return a folder's images with a fifth of every class, chosen by ``split_seed``, as the test set."""
    train, test = everything.split(round(len(everything) * TEST_SHARE), split_seed)
    return Source(train, test, left_out=everything.left_out)


def find_parts(folder: Path) -> dict[str, Path]:
    """Return the folders of "train", "test" and, where there is one, "validation"; none of them for a folder of classes.

    Case does not matter, and without ``test/`` the validation folder is "test". Raises DataError when a part is there twice
    or ``folder`` is no folder.
    """
    require_folder(folder)
    parts: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.name.lower() in _PARTS and path.is_dir()):
        other = parts.setdefault(_PARTS[path.name.lower()], path)
        if other != path:
            raise DataError(f"{folder} has both {other.name}/ and {path.name}/; keep one")
    if not parts.keys() & {"train", "test"}:
        return {}
    if "test" not in parts and "validation" in parts:
        logger.info("%s has no test/: %s/ is the test set", folder, parts["validation"].name)
        parts["test"] = parts.pop("validation")
    return parts


def load_folder(
    folder: Path, spec: InputSpec, *, skip_unreadable: bool = False, class_names: Sequence[str] | None = None
) -> Dataset:
    """Read the images in ``folder/<class>/`` and the folders below it, classes and files in sorted order.

    ``class_names`` gives the classes of a model; the folder may then hold some of them only. Raises DataError when there
    is no such folder, when there are fewer than two classes (or ones that are not in ``class_names``), when a class has no
    readable image, and, unless ``skip_unreadable``, when more than a tenth of the files cannot be decoded. Unreadable files are
    named in the log.
    """
    require_folder(folder)
    folders = class_folders(folder)
    names = tuple(dict.fromkeys(name for name, _ in folders))
    check_classes(folder, names, class_names)
    names = names if class_names is None else tuple(class_names)
    left_out = Counter(
        "images in no class folder" for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    paths: list[Path] = []
    labels: list[int] = []
    for name, class_folder in folders:
        files = _files(class_folder)
        chosen = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not chosen:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{class_folder} holds no image ({suffixes}); fill it or remove the folder")
        suffixes_of_others = (path.suffix.lower() for path in files if path.suffix.lower() not in IMAGE_SUFFIXES)
        left_out.update(f"{suffix or 'other'} files" for suffix in suffixes_of_others)
        paths += chosen
        labels += [names.index(name)] * len(chosen)
    images, readable = _read(paths, spec, most_unreadable=1.0 if skip_unreadable else _UNREADABLE_SHARE)
    labels = [labels[index] for index in readable]
    present = {names[label] for label in labels}
    for name, class_folder in folders:
        if name not in present:
            raise DataError(f"{class_folder} holds no readable image; fill it or remove the folder")
    left_out["unreadable files"] += len(paths) - len(readable)
    return Dataset(images, torch.tensor(labels), names, tuple(paths[index] for index in readable), +left_out)


def load_unknown(folder: Path, metadata: CheckpointMetadata) -> Dataset:
    """Read all images in ``folder`` and below it, which are of no class of a model; their labels, 0, do not count.

    Unreadable files are named in the log. Raises DataError when there is no such folder, or no readable image in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that holds images of other things")
    paths = image_paths(folder)
    images, readable = _read(paths, metadata.input, most_unreadable=1.0)
    if not len(images):
        raise DataError(f"{folder} holds no readable image; give a folder of images of other things")
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Dataset(images, labels, metadata.class_names, tuple(paths[index] for index in readable))


def _read(paths: Sequence[Path], spec: InputSpec, most_unreadable: float) -> tuple[torch.Tensor, list[int]]:
    """Decode all files, on all cores. Return uint8 (readable files, 3, size, size) and the indices of their paths.

    Files that cannot be read are named in the log; raises DataError when they are more than the share ``most_unreadable``.
    """
    images = np.empty((len(paths), 3, spec.size, spec.size), np.uint8)
    readable: list[int] = []
    errors: list[str] = []

    def decode(path: Path) -> NDArray[np.uint8] | str:
        try:
            return decode_image(read_file(path), spec)
        except (ServiceError, OSError) as error:
            return str(error).partition(";")[0]  # what follows is advice to a client of the service

    with ThreadPoolExecutor(available_cores()) as threads:
        read = threads.map(decode, paths)
        shown = tqdm(read, "reading", len(paths), unit=" images", disable=len(paths) < _SHOWN_FROM)
        for index, decoded in enumerate(shown):
            if isinstance(decoded, str):
                errors.append(f"{paths[index]}: {decoded}")
            else:
                images[len(readable)] = decoded
                readable.append(index)
    if len(errors) > most_unreadable * len(paths):
        lines = errors[:_SHOWN] + ([f"and {len(errors) - _SHOWN} more"] if len(errors) > _SHOWN else [])
        listed = "\n  ".join(lines)
        raise DataError(f"{len(errors)} files cannot be read (pass --skip-unreadable to go on without them):\n  {listed}")
    for error in errors:
        logger.warning("skipped %s", error)
    return torch.from_numpy(images[: len(readable)]), readable


def _files(folder: Path) -> list[Path]:
    """Return all files below ``folder`` but hidden ones, sorted; links are followed, and each folder is visited once."""
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.is_file() or path.is_symlink()]
    return sorted(files)


def require_folder(folder: Path) -> None:
    """Raise DataError unless ``folder`` is one that can be listed."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; give a folder that holds a folder of images for every class")


def class_folders(folder: Path) -> list[tuple[str, Path]]:
    """Return each class folder in ``folder`` with its name, which is in Unicode's composed form, sorted."""
    return sorted(
        (unicodedata.normalize("NFC", path.name), path)
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__MACOSX"))
    )


def image_paths(class_folder: Path) -> list[Path]:
    """Return all files of images in ``class_folder`` and the folders below it, sorted."""
    return [path for path in _files(class_folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def check_classes(folder: Path, names: Sequence[str], class_names: Sequence[str] | None) -> None:
    """Raise DataError unless the classes ``names`` in ``folder`` are two or more, or some of a model's ``class_names``."""
    if len(names) < (2 if class_names is None else 1):
        needed = "at least 2 are needed, each" if class_names is None else "it needs one for each class,"
        raise DataError(f"{folder} holds {'one class folder' if names else 'no class folders'}; {needed} named after its class")
    if class_names is not None and (unknown := [name for name in names if name not in class_names]):
        raise DataError(f"{folder} has classes that are not among {', '.join(class_names)}: {', '.join(unknown[:_SHOWN])}")
