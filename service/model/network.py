"""The network in torch, built from its layers; for training, and for inference where torch is the runtime."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from service.model.checkpoint import Checkpoint
from service.model.layers import Convolution, Layer, Layers, Linear, MaxPool, Mean, Residual, in_order


class Network(nn.Module):
    """The layers as torch modules, each registered under its own dotted name, so that weights have the checkpoint's names.

    Without ``norms``, a convolution has a bias in place of its batch norm: ``layers.folded`` gives the weights. Raises
    ValueError when two modules have one name.
    """

    def __init__(self, layers: Layers, *, norms: bool = True) -> None:
        super().__init__()
        self.layers = layers
        # A plain dict, since torch would register a module twice. Training replaces classes of modules, never modules.
        self._modules_of: dict[str, list[nn.Module]] = {}
        for layer in in_order(layers):
            modules = _modules(layer, norms)
            self._modules_of[_key(layer)] = list(modules.values())
            for name, module in modules.items():
                self._register(name, module)
        self.reset_parameters()

    def _register(self, name: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *path, last = name.split(".")
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        if last in dict(parent.named_children()):
            raise ValueError(f"two modules of the network are called {name!r}")
        parent.add_module(last, module)

    def modules_of(self, layer: Layer) -> list[nn.Module]:
        """The torch modules of one layer, in the order of evaluation: convolution, norm, ReLU."""
        return self._modules_of[_key(layer)]

    def reset_parameters(self) -> None:
        """Kaiming fan-out for every convolution before a ReLU (He et al. 2015, equation 14); PyTorch's own for the head."""
        for layer in in_order(self.layers):
            if isinstance(layer, Convolution):
                weight = self.get_parameter(f"{layer.name}.weight")
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images, float (N, in_channels, H, W), to logits, float (N, num_classes)."""
        return self.to_logits(self.to_features(x))

    def to_features(self, x: Tensor) -> Tensor:
        """Map normalised images to what the head reads, float (N, channels of the last stage, 1, 1)."""
        return self._run(self.layers[:-1], x)

    def to_logits(self, features: Tensor) -> Tensor:
        """Map what ``to_features`` returned to logits, float (N, num_classes)."""
        return self._run(self.layers[-1:], features).flatten(1)

    def _run(self, layers: Layers, x: Tensor) -> Tensor:
        for layer in layers:
            if isinstance(layer, Residual):
                x = self._run(layer.body, x) + self._run(layer.shortcut, x)
            elif isinstance(layer, Linear) and not layer.as_convolution:
                x = x.flatten(1)
            for module in self.modules_of(layer):
                x = module(x)
        return x


def _key(layer: Layer) -> str:
    return layer.relu if isinstance(layer, Residual) else layer.name


def _modules(layer: Layer, norms: bool) -> dict[str, nn.Module]:
    match layer:
        case Residual():
            return {layer.relu: nn.ReLU(inplace=True)}
        case MaxPool():
            return {layer.name: nn.MaxPool2d(layer.kernel, layer.stride, layer.pad)}
        case Mean():
            return {layer.name: nn.AdaptiveAvgPool2d(1)}
        case Linear():
            sizes = layer.in_features, layer.out_features
            return {layer.name: nn.Conv2d(*sizes, 1) if layer.as_convolution else nn.Linear(*sizes)}
    channels = layer.in_channels, layer.out_channels
    bias = layer.bias or (layer.norm is not None and not norms)
    modules: dict[str, nn.Module] = {layer.name: nn.Conv2d(*channels, layer.kernel, layer.stride, layer.pad, bias=bias)}
    if layer.norm and norms:
        modules[layer.norm] = nn.BatchNorm2d(layer.out_channels)
    if layer.relu:
        modules[layer.relu] = nn.ReLU(inplace=True)
    return modules


def model_from_checkpoint(checkpoint: Checkpoint) -> Network:
    """Rebuild the network in float32 on the CPU, in eval mode."""
    model = Network(checkpoint.layers)
    weights = {name: torch.from_numpy(value.astype(np.float32)) for name, value in checkpoint.weights.items()}
    model.load_state_dict(weights, strict=False)  # the layers fit the weights; only the counters are absent
    return model.eval()
