"""The weights of a trained network as the beginning of another run."""

from __future__ import annotations

import contextlib
import logging
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import load_file
from torch import Tensor

from service.model.architectures import MODELS
from service.model.checkpoint import Checkpoint, CheckpointMetadata, load_checkpoint, version_of
from service.model.layers import Linear
from service.model.network import Network, model_from_checkpoint
from training.errors import RunError

logger = logging.getLogger(__name__)

IMAGENET = "imagenet"
_IMAGENET_ARCHITECTURE = "resnet18-imagenet"


def load_initial(source: str) -> Checkpoint:
    """Load what ``--initial-checkpoint`` names: a checkpoint, a state dict of torchvision's ResNet-18, or ``imagenet``.

    ``imagenet`` is torchvision's published weights, which it downloads once into the ``checkpoints`` folder of
    ``torch.hub.get_dir()``. A state dict is a ``.pth`` or ``.pt`` file, loaded without executing anything in it, or a
    safetensors file. Raises CheckpointError for weights that do not fit, and RunError for those that cannot be read.
    """
    path = Path(source)
    if source == IMAGENET:
        return _of_torchvision(_published(), IMAGENET)
    if path.suffix in (".pth", ".pt"):
        try:
            return _of_torchvision(torch.load(path, map_location="cpu", weights_only=True), source)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise RunError(
                f"cannot read weights from {path}: {str(error).splitlines()[0] if str(error) else 'it is cut short'}"
            ) from error
    if _is_state_dict(path):
        return _of_torchvision(load_file(path), source)
    return load_checkpoint(path)


def _published() -> dict[str, Tensor]:
    from torchvision.models import ResNet18_Weights

    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says there that it downloads
            state: dict[str, Tensor] = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # not reached, of another hash, damaged
        raise RunError(
            f"cannot download torchvision's ImageNet weights ({getattr(error, 'reason', error)}); download"
            f" {ResNet18_Weights.IMAGENET1K_V1.url} elsewhere and give its path as --initial-checkpoint (INITIAL of make)"
        ) from error
    return state


def _is_state_dict(path: Path) -> bool:
    """Whether this is a safetensors file without our metadata."""
    try:
        with safe_open(path, "pt") as file:
            return "checkpoint" not in (file.metadata() or {}) and "fc.weight" in file.keys()  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return False  # load_checkpoint says what is wrong


def _of_torchvision(state: Any, source: str) -> Checkpoint:
    """Make a checkpoint of a state dict of ``torchvision.models.resnet18``, for as many classes as its last layer has."""
    if (
        not isinstance(state, dict)
        or not all(isinstance(value, Tensor) for value in state.values())
        or "fc.weight" not in state
    ):
        raise RunError(f"{source} is no state dict of torchvision.models.resnet18; save model.state_dict()")
    weights = {
        name: np.ascontiguousarray(value.float().numpy())
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    classes, usual = len(weights["fc.weight"]), MODELS[_IMAGENET_ARCHITECTURE]
    metadata = CheckpointMetadata(
        name=_IMAGENET_ARCHITECTURE,
        architecture=_IMAGENET_ARCHITECTURE,
        config=replace(usual.config, num_classes=classes),
        class_names=tuple(f"output {index} of {source}" for index in range(classes)),  # a state dict has no names
        input=usual.input,
    )
    return Checkpoint(weights, metadata, version_of(save(weights)))


def begin_from(model: Network, checkpoint: Checkpoint, class_names: tuple[str, ...]) -> None:
    """Copy the weights and running statistics of ``checkpoint`` into ``model``, a network for ``class_names``.

    In the last layer a class takes the weights of the class of the same name, wherever it stands there, and keeps its own where
    the checkpoint does not know it (Yosinski et al., "How transferable are features in deep neural networks?", 2014). Raises
    RunError when the networks differ in more than their classes, and CheckpointError when the checkpoint is damaged.
    """
    metadata, last = checkpoint.metadata, model.layers[-1]
    assert isinstance(last, Linear), "a network ends in a linear layer"
    head = f"{last.name}."
    initial, own = model_from_checkpoint(checkpoint).state_dict(), model.state_dict()
    theirs, ours = ({name: tuple(value.shape) for name, value in state.items()} for state in (initial, own))
    different = [name for name in theirs | ours if theirs.get(name) != ours.get(name) and not name.startswith(head)]
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
            if name.startswith(head):
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
