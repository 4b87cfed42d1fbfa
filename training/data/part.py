"""Which images of a folder a model is measured on: those that its training held out, where they can be known."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from service.model.checkpoint import CheckpointMetadata
from training.data.dataset import Dataset
from training.data.folder import find_parts, hold_out_test, load_folder
from training.errors import DataError

logger = logging.getLogger(__name__)


def load_part(
    folder: Path, part: str | None, metadata: CheckpointMetadata, split_seed: int, skip_unreadable: bool
) -> tuple[Dataset, str]:
    """Return the ``part`` of ``folder`` ("test", "train" or "all") and what it is, for the model of ``metadata``.

    By default that is ``test/``; of a folder without one, what the training held out of it; else all of it. Logs where the
    model was, or may have been, trained on the images. Raises DataError where there is no such part, and as ``load_folder``.
    """
    load = partial(load_folder, spec=metadata.input, skip_unreadable=skip_unreadable, class_names=metadata.class_names)
    if (parts := find_parts(folder)) and part != "all":
        if (part := part or "test") not in parts:
            raise DataError(f"{folder} has no {part}/; add it, or give another folder or --part")
        return load(parts[part]), str(parts[part])
    everything = load(folder)
    source = hold_out_test(everything, split_seed)
    of_run = metadata.recipe.get("data_digest")
    is_of_run = source.digest() == of_run
    part = part or ("test" if is_of_run else "all")
    if is_of_run and part != "test":
        logger.warning("the model was trained on most of these images: no test; leave out --part")
    elif of_run and not is_of_run:
        logger.warning(
            "the files in %s, or --split-seed, are not those of the training: images that it used are no test", folder
        )
    data = {"all": everything, "train": source.train, "test": source.test}[part]
    if not len(data):
        raise DataError(f"{folder} has too few images to hold some out for the test; give --part all")
    return data, str(folder) if part == "all" else f"the {part} part of {folder}"
