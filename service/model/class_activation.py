"""Class activation maps: where in an image the network finds what speaks for a class.

Owns: the network's forward pass and the gradient of a class's logit for one image, in numpy. Does not know: queues, HTTP,
devices. Numpy alone, because then the maps are the same whatever runtime predicts, and cost the device nothing; about 45 ms on
one core is fast enough for a person who asks.

HiResCAM (Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
2020): a layer's activations times the logit's gradient with respect to them, summed over the channels. On the last stage this
is the class activation map of Zhou et al. (2016), head weights times feature map; but at 2x2 places that see the whole image
each, it says little. So the maps of the stages before it are added, each scaled to a maximum of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from service.model.checkpoint import Checkpoint, CheckpointError

Array = NDArray[np.float32]
_NORM_EPSILON = np.float32(1e-5)  # torch.nn.BatchNorm2d's default


class ClassActivation:
    """The maps of one checkpoint's network. It keeps the weights as they are stored, and may be used by several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError when the architecture is not one whose maps this module can make."""
        metadata, weights = checkpoint.metadata, checkpoint.weights
        if metadata.architecture != "resnet18":
            raise CheckpointError(f"there are no class activation maps for architecture {metadata.architecture!r}")
        spec = metadata.input
        self._mean, self._std = (np.array(values, np.float32)[:, None, None] * 255 for values in (spec.mean, spec.std))
        self._stem = _Conv(weights, "stem.0", "stem.1")
        self._stages = [
            [_Block(weights, f"stages.{stage}.{block}", stride=2 if block == 0 else 1) for block in range(depth)]
            for stage, depth in enumerate(metadata.config["depths"])
        ]
        self._head = weights["head.weight"][:, :, 0, 0].astype(np.float32)
        self._head_bias = weights["head.bias"].astype(np.float32)

    def heatmap(self, image: NDArray[np.uint8], label: int | None = None) -> tuple[int, Array]:
        """Give the class and its map: float32 (size, size) in 0..1 for uint8 (3, size, size), RGB.

        1 is where the most speaks for ``label``, the likeliest class if None, against the average of all classes; the map
        is 0 everywhere when nothing does.
        """
        activations, tapes = self._forward(image)
        features = activations[-1]
        logits = self._head @ features.mean((1, 2)) + self._head_bias
        if label is None:
            label = int(logits.argmax())
        # Of the logit less the mean of all: a softmax does not see what all classes have in common.
        gradient = np.broadcast_to(((self._head[label] - self._head.mean(0)) / features[0].size)[:, None, None], features.shape)
        last = len(self._stages) - 1
        total = np.zeros(image.shape[1:], np.float32)
        for stage in range(last, -1, -1):
            if stage < last or stage == 0:
                evidence = (activations[stage] * gradient).sum(0).clip(min=0)
                total += _scaled(resize_map(evidence, image.shape[1]))
            if stage > 0:
                for block, tape in zip(reversed(self._stages[stage]), reversed(tapes[stage]), strict=True):
                    gradient = block.gradient(gradient, tape)
        return label, _scaled(total)

    def _forward(self, image: NDArray[np.uint8]) -> tuple[list[Array], list[list[_Tape]]]:
        """Give the output of every stage, float32 (channels, h, w), and what the way back needs."""
        x = self._stem((image - self._mean) / self._std).clip(min=0)
        activations: list[Array] = []
        tapes: list[list[_Tape]] = []
        for blocks in self._stages:
            tapes.append([])
            for block in blocks:
                x, tape = block.forward(x)
                tapes[-1].append(tape)
            activations.append(x)
        return activations, tapes


def resize_map(grid: Array, size: int) -> Array:
    """Resize float32 (h, w) to (size, size): bilinear between the places, constant beyond the last.

    Place i of h is drawn at pixel i * size / h and not in the middle of its cell: there is the centre of what it sees, since a
    3x3 convolution with stride 2 and padding 1 centres its output i on its input 2 i.
    """
    for axis in (0, 1):
        places = grid.shape[axis]
        at = np.arange(size, dtype=np.float32) * places / size
        low = at.astype(np.intp)
        share = (at - low)[:, None] if axis == 0 else at - low
        grid = grid.take(low, axis) * (1 - share) + grid.take(np.minimum(low + 1, places - 1), axis) * share
    return grid


def _scaled(values: Array) -> Array:
    """Scale to a maximum of 1; zeros stay zeros."""
    peak = values.max()
    return values / peak if peak > 0 else values


class _Conv:
    """A convolution without gaps, padded to keep its input's size at stride 1, with the batch norm behind it if any."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], conv: str, norm: str | None = None, stride: int = 1) -> None:
        self._weight = weights[f"{conv}.weight"]
        self._stride = stride
        self._scale = np.ones(len(self._weight), np.float32)
        self._shift = np.zeros(len(self._weight), np.float32)
        if norm is not None:
            gamma, beta, mean, variance = (
                weights[f"{norm}.{name}"].astype(np.float32) for name in ("weight", "bias", "running_mean", "running_var")
            )
            self._scale = gamma / np.sqrt(variance + _NORM_EPSILON)
            self._shift = beta - mean * self._scale
        if f"{conv}.bias" in weights:
            self._shift = self._shift + weights[f"{conv}.bias"].astype(np.float32) * self._scale

    def __call__(self, x: Array) -> Array:
        """Map float32 (in, H, W) to (out, h, w)."""
        kernel, stride = self._weight.shape[2], self._stride
        windows = sliding_window_view(_padded(x, kernel // 2), (kernel, kernel), (1, 2))[:, ::stride, ::stride]
        y = np.tensordot(self._weight.astype(np.float32), windows, ((1, 2, 3), (0, 3, 4)))
        return y * self._scale[:, None, None] + self._shift[:, None, None]

    def gradient(self, gradient: Array, shape: tuple[int, ...]) -> Array:
        """Map the gradient of the output, float32 (out, h, w), to that of the input of ``shape`` (in, H, W)."""
        kernel, stride = self._weight.shape[2], self._stride
        _, height, width = gradient.shape
        scaled = gradient * self._scale[:, None, None]
        columns = np.tensordot(self._weight.astype(np.float32), scaled, ((0,), (0,)))  # (in, kernel, kernel, h, w)
        padded = _padded(np.zeros(shape, np.float32), kernel // 2)
        for y in range(kernel):
            for x in range(kernel):
                padded[:, y : y + stride * height : stride, x : x + stride * width : stride] += columns[:, y, x]
        edge = kernel // 2
        return padded[:, edge : edge + shape[1], edge : edge + shape[2]]


def _padded(x: Array, edge: int) -> Array:
    return np.pad(x, ((0, 0), (edge, edge), (edge, edge)))


# A block's input shape, and where its two ReLUs let something through.
_Tape = tuple[tuple[int, ...], NDArray[np.bool_], NDArray[np.bool_]]


class _Block:
    """``service.model.network.BasicBlock``, forwards and backwards."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], name: str, stride: int) -> None:
        self._conv1 = _Conv(weights, f"{name}.conv1", f"{name}.norm1", stride)
        self._conv2 = _Conv(weights, f"{name}.conv2", f"{name}.norm2")
        self._projection = (
            _Conv(weights, f"{name}.projection", stride=stride) if f"{name}.projection.weight" in weights else None
        )

    def forward(self, x: Array) -> tuple[Array, _Tape]:
        inner = self._conv1(x)
        outer = self._conv2(inner.clip(min=0)) + (x if self._projection is None else self._projection(x))
        return outer.clip(min=0), (x.shape, inner > 0, outer > 0)

    def gradient(self, gradient: Array, tape: _Tape) -> Array:
        shape, inner, outer = tape
        gradient = gradient * outer
        shortcut = gradient if self._projection is None else self._projection.gradient(gradient, shape)
        through = self._conv2.gradient(gradient, inner.shape) * inner
        return self._conv1.gradient(through, shape) + shortcut
