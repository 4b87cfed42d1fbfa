"""The layer table of a network."""

from __future__ import annotations

from dataclasses import replace

import torchinfo
from torch import nn

from service.model.architectures import MODELS, Architecture, resnet18
from service.model.checkpoint import Checkpoint
from service.model.network import build_model, model_from_checkpoint


def summary_of_checkpoint(checkpoint: Checkpoint) -> str:
    """Return the table of a checkpoint's network at its own input size."""
    return layer_table(model_from_checkpoint(checkpoint), checkpoint.metadata.input.size)


def summary_of_architecture(architecture: str, num_classes: int | None = None, size: int | None = None) -> str:
    """Return the table of an architecture, with its usual classes and input size by default; ValueError when it is unknown."""
    usual = MODELS.get(architecture, Architecture(resnet18))
    config = replace(usual.config, num_classes=num_classes or usual.config.num_classes)
    return layer_table(build_model(architecture, config), size or usual.input.size)


def layer_table(model: nn.Module, size: int) -> str:
    """Return every layer with its output shape, parameters and mult-adds for one RGB image of ``size`` x ``size`` pixels."""
    table = torchinfo.summary(
        model,
        (1, 3, size, size),
        depth=5,
        col_names=("output_size", "kernel_size", "num_params", "mult_adds"),
        row_settings=("var_names",),
        verbose=0,
    )
    return str(table)
