"""The network as it is served, in torch: normalisation, folded batch norms, calibrated probabilities, typicality."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.checkpoint import Calibration, Checkpoint
from service.model.layers import Convolution, Layer, Layers, Linear, Residual, folded, in_order
from service.model.network import Network
from service.model.typicality import Typicality


class Classifier(nn.Module):
    """uint8 images in, calibrated probabilities and typicality out: everything that runs on the device, in one module."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, *, fused: bool = False) -> None:
        super().__init__()
        self.network = folded_network(checkpoint, fused=fused).to(dtype).to(memory_format=torch.channels_last)
        spec = checkpoint.metadata.input
        self.mean = nn.Buffer(torch.tensor(spec.mean).view(1, 3, 1, 1) * 255)
        self.std = nn.Buffer(torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self.calibration = checkpoint.metadata.calibration
        self.dtype = dtype
        self.typicality = None if checkpoint.typicality is None else TypicalityTail(checkpoint.typicality)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 3, size, size) to float32 (N, num_classes), on the module's device.

        A checkpoint with a typicality has it as one more column.
        """
        x = ((images.float() - self.mean) / self.std).to(dtype=self.dtype, memory_format=torch.channels_last)
        features = self.network.to_features(x)
        probabilities = calibrated(self.network.to_logits(features).float(), self.calibration).softmax(1)
        if self.typicality is None:
            return probabilities
        return torch.cat([probabilities, self.typicality(features)], 1)


class TypicalityTail(nn.Module):
    """The typicality of features, in float32 whatever the network's precision."""

    def __init__(self, typicality: Typicality) -> None:
        super().__init__()
        self.centre = nn.Buffer(torch.from_numpy(typicality.centre))
        self.projection = nn.Buffer(torch.from_numpy(np.concatenate([typicality.weights, typicality.directions])))
        self.bias = nn.Buffer(torch.from_numpy(typicality.bias))
        self.held_out = nn.Buffer(torch.from_numpy(typicality.strangeness))

    def forward(self, features: Tensor) -> Tensor:
        """Map features, float (N, F, 1, 1), to typicality, float32 (N, 1)."""
        return (self.held_out >= self.strangeness(features)).float().mean(1, keepdim=True)

    def strangeness(self, features: Tensor) -> Tensor:
        """Map features, float (N, F) or (N, F, 1, 1), to their strangeness, float32 (N, 1)."""
        projected = F.linear(F.normalize(features.flatten(1).float()) - self.centre, self.projection)
        classes = len(self.bias)
        nearest = (self.bias - projected[:, :classes]).amin(1, keepdim=True)
        return nearest - projected[:, classes:].square().sum(1, keepdim=True)


def calibrated(logits: Tensor, calibration: Calibration) -> Tensor:
    """Put logits, float (N, num_classes), on the curve of ``calibration``; softmax makes calibrated probabilities of them."""
    centred = logits - logits.amax(1, keepdim=True)
    return centred / calibration.temperature + calibration.cubic * centred**3


class FusedNetwork(Network):
    """A network without norms on a CUDA device: bias, shortcut and ReLU run in the kernel of their convolution.

    For a few images a GPU takes as long to start a kernel as to run it, so the number of kernels sets the time.
    """

    def _run(self, layers: Layers, x: Tensor) -> Tensor:
        for layer in layers:
            if isinstance(layer, Residual):
                *body, last = layer.body
                x, shortcut = self._run(tuple(body), x), self._run(layer.shortcut, x)
                weight, bias, geometry = self._arguments(last)
                x = torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry)
            elif isinstance(layer, Convolution) and layer.relu:
                weight, bias, geometry = self._arguments(layer)
                x = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
            else:
                x = super()._run((layer,), x)
        return x

    def _arguments(self, layer: Layer) -> tuple[Tensor, Tensor, tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]]:
        """Weight and bias of a convolution, and its stride, padding, dilation and groups."""
        assert isinstance(layer, Convolution), "a residual's body ends in a convolution"
        weight, bias = (self.get_parameter(f"{layer.name}.{kind}") for kind in ("weight", "bias"))
        return weight, bias, ((layer.stride,) * 2, (layer.pad,) * 2, (1, 1), 1)


def folded_network(checkpoint: Checkpoint, *, fused: bool = False) -> Network:
    """The network of a checkpoint with its batch norms folded into its convolutions, float32 on the CPU, in eval mode.

    ``fused`` is for CUDA devices only.
    """
    network = (FusedNetwork if fused else Network)(checkpoint.layers, norms=False)
    with torch.no_grad():
        for layer in in_order(network.layers):
            if isinstance(layer, Convolution | Linear):
                for kind, values in zip(("weight", "bias"), folded(layer, checkpoint.weights), strict=True):
                    if values is not None:
                        parameter = network.get_parameter(f"{layer.name}.{kind}")
                        parameter.copy_(torch.from_numpy(values).view_as(parameter))
    return network.eval()
