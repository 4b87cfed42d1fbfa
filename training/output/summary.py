"""The layer table of a network."""

from __future__ import annotations

import torchinfo
from torch import nn

from service.model.architectures import MODELS
from service.model.checkpoint import Checkpoint
from service.model.network import model_from_checkpoint
from training.step.network import build_model


def summary_of_checkpoint(checkpoint: Checkpoint) -> str:
    """Return the table of a checkpoint's network at its own input size."""
    return layer_table(model_from_checkpoint(checkpoint), checkpoint.metadata.input.size)


def summary_of_architecture(name: str) -> str:
    """Return the table of an architecture of ``MODELS`` with its usual classes and input size."""
    return layer_table(build_model(name, MODELS[name].config), MODELS[name].input.size)


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
