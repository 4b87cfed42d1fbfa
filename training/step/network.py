"""A network before its training, and its weights as a checkpoint keeps them."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from torch import nn

from service.model.architectures import ModelConfig, layers_for
from service.model.network import Network


def build_model(architecture: str, config: ModelConfig) -> Network:
    """Build an untrained network; raise ValueError when the architecture is not in ``MODELS``."""
    return Network(layers_for(architecture, config))


def weights_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The weights for ``save_checkpoint``: float32 numpy arrays by name, without batch-norm counters."""
    return {
        name: value.detach().float().cpu().numpy()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
