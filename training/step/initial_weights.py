"""The weights of a trained network as the beginning of another run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from service.model.checkpoint import Checkpoint
from service.model.network import model_from_checkpoint
from training.errors import RunError

logger = logging.getLogger(__name__)

_HEAD = "head."


def begin_from(model: nn.Module, checkpoint: Checkpoint, class_names: tuple[str, ...]) -> None:
    """Return ``model``, a network for ``class_names``, the weights and running statistics of ``checkpoint``.

    In the last layer a class takes the weights of the class of the same name, wherever it stands there, and keeps its own where
    the checkpoint does not know it (Yosinski et al., "How transferable are features in deep neural networks?", 2014). Raises
    RunError when the networks differ in more than their classes, and CheckpointError when the checkpoint is damaged.
    """
    metadata = checkpoint.metadata
    initial, own = model_from_checkpoint(checkpoint).state_dict(), model.state_dict()
    theirs, ours = ({name: tuple(value.shape) for name, value in state.items()} for state in (initial, own))
    different = [name for name in theirs | ours if theirs.get(name) != ours.get(name) and not name.startswith(_HEAD)]
    if different:
        name = different[0]
        raise RunError(
            f"{metadata.name} is another network than the recipe's: its {name} is {theirs.get(name, 'absent')}, the recipe's"
            f" {ours.get(name, 'absent')}; give an --initial-checkpoint of the same network, or leave it out"
        )
    known = [name for name in class_names if name in metadata.class_names]
    rows, sources = [class_names.index(name) for name in known], [metadata.class_names.index(name) for name in known]
    with torch.no_grad():
        for name, value in own.items():
            if name.startswith(_HEAD):
                value[rows] = initial[name][sources].to(value)
            else:
                value.copy_(initial[name])
    logger.info(
        "beginning with the weights of %s, which knows %d of the %d classes", metadata.name, len(known), len(class_names)
    )


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint says of the one that its run began from."""
    metadata = checkpoint.metadata
    return {"name": metadata.name, "version": checkpoint.version, "recipe": metadata.recipe.get("name", "unknown")}
