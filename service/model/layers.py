"""The layers that a network is made of, and the folding of its batch norms.

A network is a chain: each layer maps the value of the layer before it. A ``Residual`` holds two chains over the same value.
These layers are the only description of a network, which every runtime and the class activation maps read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_NORM_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default


@dataclass(frozen=True)
class Convolution:
    """A square convolution over zero padding, then the batch norm and the ReLU, where ``norm`` and ``relu`` name one.

    Weights: ``<name>.weight`` (out, in, kernel, kernel), ``<name>.bias`` (out,) if ``bias``; those of a norm are
    ``<norm>.weight``, ``.bias``, ``.running_mean`` and ``.running_var``, each (out,).
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    pad: int = 0
    bias: bool = False
    norm: str | None = None
    relu: str | None = None


@dataclass(frozen=True)
class MaxPool:
    """The maximum over square windows; padding never is the maximum."""

    name: str
    kernel: int
    stride: int
    pad: int


@dataclass(frozen=True)
class Mean:
    """The mean over all pixels: (N, channels, H, W) to (N, channels)."""

    name: str


@dataclass(frozen=True)
class Linear:
    """(N, in_features) to (N, out_features), with a bias; ``as_convolution`` if the weight is stored as (out, in, 1, 1)."""

    name: str
    in_features: int
    out_features: int
    as_convolution: bool = False


@dataclass(frozen=True)
class Residual:
    """``relu(body(x) + shortcut(x))``. An empty shortcut is the identity. The body ends in a convolution without a ReLU."""

    body: Layers
    shortcut: Layers
    relu: str


Layer = Convolution | MaxPool | Mean | Linear | Residual
Layers = tuple[Layer, ...]


def in_order(layers: Layers) -> Iterator[Layer]:
    """All layers in the order of evaluation; a residual comes after the layers inside it."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from in_order(layer.body + layer.shortcut)
        yield layer


def weight_shapes(layers: Layers) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a checkpoint of this network holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in in_order(layers):
        if isinstance(layer, Linear):
            shapes[f"{layer.name}.weight"] = (layer.out_features, layer.in_features, *([1, 1] if layer.as_convolution else []))
            shapes[f"{layer.name}.bias"] = (layer.out_features,)
        if isinstance(layer, Convolution):
            shapes[f"{layer.name}.weight"] = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
            vectors = [f"{layer.name}.bias"] if layer.bias else []
            if layer.norm:
                vectors += [f"{layer.norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
            shapes |= dict.fromkeys(vectors, (layer.out_channels,))
    return shapes


def folded(layer: Convolution | Linear, weights: Mapping[str, NDArray[Any]]) -> tuple[Array, Array | None]:
    """Weight and bias of ``layer`` in float32, with its batch norm folded in; the bias is None where there is none.

    The norm uses its running statistics, as in eval mode. Nothing is cached, so that ``weights`` may stay in float16.
    """
    weight = weights[f"{layer.name}.weight"].astype(np.float32)
    if isinstance(layer, Linear):
        return weight.reshape(layer.out_features, layer.in_features), weights[f"{layer.name}.bias"].astype(np.float32)
    bias = weights[f"{layer.name}.bias"].astype(np.float32) if layer.bias else None
    if layer.norm is None:
        return weight, bias
    gamma, beta, mean, variance = (
        weights[f"{layer.norm}.{name}"].astype(np.float32) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + _NORM_EPSILON)
    shift = beta - mean * scale
    return weight * scale.reshape(-1, 1, 1, 1), shift if bias is None else shift + bias * scale
