"""Where the teacher of a distilled network comes from: a file, or a run of its own before the student's."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from service.model.checkpoint import Checkpoint, load_checkpoint
from training.data.dataset import Dataset, Source
from training.errors import RunError
from training.recipes import Distillation, find_recipe
from training.run.run_folder import CHECKPOINT_FILE
from training.step.parallel import Parallel
from training.train import RunOptions, train

logger = logging.getLogger(__name__)

TEACHER_FOLDER = "teacher"
_ENLARGED_AT_ONCE = 5000


def prepare_teacher(
    distillation: Distillation, source: Source, options: RunOptions, parallel: Parallel, path: Path | None = None
) -> Checkpoint:
    """Load the teacher at ``path``, or train the recipe's own in a folder inside the student's, where that is not done yet.

    Raises RunError for a teacher of other classes, and what ``train`` raises.
    """
    own = options.out / TEACHER_FOLDER / CHECKPOINT_FILE
    if path is None and not _is_finished(own):
        spec = replace(options.input, size=options.input.size * distillation.scale)
        logger.info("first the teacher: recipe %s at %d pixels, in %s", distillation.teacher, spec.size, own.parent)
        run = replace(options, out=own.parent, input=spec, model_name=f"{options.model_name}-teacher")
        train(find_recipe(distillation.teacher), _enlarged(source, spec.size, options.device), run, parallel)
    teacher = load_checkpoint(path or own)
    theirs, ours = teacher.metadata.class_names, source.train.class_names
    if theirs != ours:
        raise RunError(
            f"the teacher {path or own} knows the classes {', '.join(theirs)}, and the data has {', '.join(ours)};"
            " leave --teacher out to train one on this data"
        )
    return teacher


def _is_finished(path: Path) -> bool:
    return path.exists() and "test_accuracy" in load_checkpoint(path).metadata.metrics


def _enlarged(source: Source, size: int, device: torch.device) -> Source:
    """Return the same images with a side of ``size`` pixels, on ``device``."""

    def enlarge(data: Dataset) -> Dataset:
        parts = [
            F.interpolate(part.to(device).float(), size=(size, size), mode="bilinear", align_corners=False).round().byte()
            for part in data.images.split(_ENLARGED_AT_ONCE)
        ]
        return replace(data, images=torch.cat(parts), labels=data.labels.to(device))

    validation = None if source.validation is None else enlarge(source.validation)
    return replace(source, train=enlarge(source.train), test=enlarge(source.test), validation=validation)
