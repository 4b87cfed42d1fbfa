"""Class activation maps: where in an image the network finds what speaks for a class.

HiResCAM (Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
2020): a layer's activations times the logit's gradient with respect to them, summed over the channels. Where the last stage has
2x2 pixels that see the whole image each, its map says little. So the maps of all stages with larger outputs are added, each
scaled to a maximum of 1.

The forward pass and the gradient are computed here in numpy, from the network's layers. So the maps are the same whatever
runtime predicts, and cost the device nothing. About 60 ms on one core for 32x32 pixels is fast enough for a person who asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from service.model.checkpoint import Checkpoint
from service.model.layers import Array, Convolution, Layer, Layers, Linear, MaxPool, Mean, Residual, folded

_LEAST_SIDE = 4  # pixels of an activation that is shown


Step = tuple[Array, Callable[[Array], Array]]
"""An output, and the function from the gradient of that output to the gradient of the input."""


class ClassActivation:
    """The maps of one checkpoint's network. It keeps the weights as they are stored, and may be used by several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec = checkpoint.metadata.input
        self._mean, self._std = (np.array(values, np.float32)[:, None, None] * 255 for values in (spec.mean, spec.std))
        self._layers = checkpoint.layers
        self._weights = checkpoint.weights

    def heatmap(self, image: NDArray[np.uint8], label: int | None = None) -> tuple[int, Array]:
        """Return the class and its map: float32 (size, size) in 0..1 for uint8 (3, size, size), RGB.

        1 is where the most speaks for ``label``, the likeliest class if None, against the average of all classes; the map
        is 0 everywhere when nothing does.
        """
        logits: Array = (image - self._mean) / self._std
        steps: list[Step] = []
        for layer in self._layers:
            steps.append(self._step(layer, logits))
            logits = steps[-1][0]
        if label is None:
            label = int(logits.argmax())
        # Of the logit less the mean of all: a softmax does not see what all classes have in common.
        gradient = np.full(logits.shape, -1 / len(logits), np.float32)
        gradient[label] += 1
        shown = self._shown(steps)
        total = np.zeros(image.shape[1:], np.float32)
        for index in range(len(steps) - 1, min(shown) - 1, -1):
            output, back = steps[index]
            if index in shown:
                total += _scaled(resize_map((output * gradient).sum(0).clip(min=0), image.shape[1]))
            if index > min(shown):
                gradient = back(gradient)
        return label, _scaled(total)

    def _shown(self, steps: list[Step]) -> set[int]:
        """The last block of each resolution, those of a few pixels left out; the first block if all are.

        In a network without residual blocks every convolution is one.
        """
        kind = Residual if any(isinstance(layer, Residual) for layer in self._layers) else Convolution
        blocks = [index for index, layer in enumerate(self._layers) if isinstance(layer, kind)]
        last = {steps[index][0].shape[1]: index for index in blocks}
        return {index for side, index in last.items() if side >= _LEAST_SIDE} or {blocks[0]}

    def _step(self, layer: Layer, x: Array) -> Step:
        """Evaluate one layer for float32 (channels, h, w)."""
        match layer:
            case Linear():
                weight, bias = folded(layer, self._weights)
                assert bias is not None, "a linear layer has one"
                return weight @ x + bias, lambda gradient: gradient @ weight
            case Mean():
                shape, pixels = x.shape, x[0].size
                mean: Array = x.mean((1, 2))
                return mean, lambda gradient: np.broadcast_to((gradient / pixels)[:, None, None], shape)
            case MaxPool():
                return _max_pool(layer, x)
            case Convolution():
                y, back = self._convolution(layer, x)
            case Residual():
                (y, body_back), (shortcut, shortcut_back) = self._chain(layer.body, x), self._chain(layer.shortcut, x)
                y, back = y + shortcut, lambda gradient: body_back(gradient) + shortcut_back(gradient)
        if layer.relu is None:
            return y, back
        positive = y > 0
        return y.clip(min=0), lambda gradient: back(gradient * positive)

    def _chain(self, layers: Layers, x: Array) -> Step:
        """Evaluate one layer after the other; without any, this is the identity."""
        backs: list[Callable[[Array], Array]] = []
        for layer in layers:
            x, back = self._step(layer, x)
            backs.insert(0, back)
        return x, lambda gradient: reduce(lambda inner, back: back(inner), backs, gradient)

    def _convolution(self, layer: Convolution, x: Array) -> Step:
        """The convolution with its norm, before the ReLU. The weights are folded again for the gradient."""
        weight, bias = folded(layer, self._weights)
        y = np.tensordot(weight, _windows(layer, _padded(layer, x)), ((1, 2, 3), (0, 3, 4)))
        if bias is not None:
            y += bias[:, None, None]
        shape = x.shape

        def back(gradient: Array) -> Array:
            weight, _ = folded(layer, self._weights)
            return _scattered(layer, np.tensordot(weight, gradient, ((0,), (0,))), shape)

        return y, back


def _max_pool(layer: MaxPool, x: Array) -> Step:
    windows = _windows(layer, _padded(layer, x, -np.inf))
    y = windows.max((3, 4))
    largest, shape = (windows == y[..., None, None]).transpose(0, 3, 4, 1, 2), x.shape
    return y, lambda gradient: _scattered(layer, largest * gradient[:, None, None], shape)


def _padded(layer: Convolution | MaxPool, x: Array, padding: float = 0) -> Array:
    return np.pad(x, ((0, 0), (layer.pad, layer.pad), (layer.pad, layer.pad)), constant_values=padding)


def _windows(layer: Convolution | MaxPool, padded: Array) -> Array:
    """A view of what a kernel covers at each of its places: (channels, h, w, kernel, kernel) of float32 (channels, H, W)."""
    windows = sliding_window_view(padded, (layer.kernel, layer.kernel), (1, 2), writeable=True)
    return windows[:, :: layer.stride, :: layer.stride]


def _scattered(layer: Convolution | MaxPool, columns: Array, shape: tuple[int, ...]) -> Array:
    """Add up the ``columns``, (channels, kernel, kernel, h, w), at the inputs that they covered, ``shape`` (channels, H, W)."""
    padded = _padded(layer, np.zeros(shape, np.float32))
    windows = _windows(layer, padded)
    for y, x in np.ndindex(layer.kernel, layer.kernel):  # of these, no two overlap
        windows[..., y, x] += columns[:, y, x]
    return padded[:, layer.pad : layer.pad + shape[1], layer.pad : layer.pad + shape[2]]


def resize_map(grid: Array, size: int) -> Array:
    """Resize float32 (h, w) to (size, size): bilinear between the pixels of the map, constant beyond the last.

    Pixel i of h is drawn at pixel i * size / h and not in the middle of its cell: there is the centre of what it sees, since a
    3x3 convolution with stride 2 and padding 1 centres its output i on its input 2 i.
    """

    def shares(places: int) -> Array:
        """How much each place counts for each pixel, (size, places)."""
        at = np.minimum(np.arange(size, dtype=np.float32) * places / size, places - 1)
        return (1 - np.abs(at[:, None] - np.arange(places))).clip(min=0).astype(np.float32)

    resized: Array = shares(grid.shape[0]).dot(grid).dot(shares(grid.shape[1]).T)
    return resized


def _scaled(values: Array) -> Array:
    """Scale to a maximum of 1; zeros stay zeros."""
    peak = values.max()
    return values / peak if peak > 0 else values
