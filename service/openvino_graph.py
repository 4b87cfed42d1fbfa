"""The network of ``service.model`` as an OpenVINO graph, built from a checkpoint's weights without torch.

Owns: folding batch norms into convolutions, the int8 form, normalisation and calibrated softmax inside the graph.
Does not know: devices, threads, batches.

The int8 form is made here from the float weights and the checkpoint's ``activation_max``, so there is no second file that
could disagree with the first: weights are rounded per output channel to -127..127, the outputs of the ReLUs to 0..255
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
The stem and the head, 1 % of the arithmetic, stay in float.

Over maps of 2x2 pixels a padded 3x3 kernel reaches every pixel from every pixel, so a ``dense`` graph multiplies by the
matrix of all its taps, from the same integers (a sum on the border of two steps may round the other way). That is less than
half of the convolutions' products, which took half of a batch's time, but nearly twice the weights to read, which is slower
for one image or two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from service.checkpoint import Calibration, Checkpoint, CheckpointError
from service.taps import all_taps

Array = NDArray[np.float32]
_TINY_SIZE = 2
_NORM_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default


def has_tiny_maps(checkpoint: Checkpoint) -> bool:
    """Whether the ``dense`` form of this checkpoint's network differs from the other at all."""
    size = checkpoint.metadata.input.size
    for _ in checkpoint.metadata.config.get("depths", ()):
        size = _halved(size, 2)
    return size <= _TINY_SIZE


def build_graph(checkpoint: Checkpoint, *, int8: bool, dense: bool = False) -> ov.Model:
    """Build uint8 (N, 3, size, size) to calibrated probabilities, float32 (N, num_classes), for any N.

    ``dense`` is the form for batches of more than a few images.

    Raises CheckpointError when a weight is missing, unexpected or of another shape, or when ``int8`` is asked of a
    checkpoint that was not calibrated for it.
    """
    metadata = checkpoint.metadata
    if metadata.architecture != "resnet18":
        raise CheckpointError(f"the OpenVINO runtime does not know architecture {metadata.architecture!r}; use runtime 'torch'")
    activation_max = metadata.calibration.activation_max if int8 else None
    graph = _Graph(_Weights(checkpoint.weights), activation_max, dense_size=_TINY_SIZE if dense else 0)
    config, spec = metadata.config, metadata.input
    images = op.parameter([-1, 3, spec.size, spec.size], ov.Type.u8, name="images")
    mean, std = (np.asarray(values, np.float32).reshape(1, 3, 1, 1) * 255 for values in (spec.mean, spec.std))
    x = op.multiply(op.subtract(op.convert(images, ov.Type.f32), op.constant(mean)), op.constant(1 / std))
    size = spec.size
    try:
        width = config["stem_width"]
        x = graph.relu("stem.2", graph.conv_norm(x, "stem.0", "stem.1", (width, 3, 3, 3), size, bias=True, quantized=False))
        for stage, (out, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
            for block in range(depth):
                x = graph.block(x, f"stages.{stage}.{block}", width, out, size, stride=2 if block == 0 else 1)
                width = out
                size = _halved(size, 2 if block == 0 else 1)
        classes = config["num_classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the checkpoint's architecture config is incomplete; export it again") from error
    x = op.reduce_mean(op.reshape(x, op.constant(np.array([0, width, -1])), special_zero=True), op.constant(np.array([2])))
    head = op.constant(graph.weights.take("head.weight", (classes, width, 1, 1)).reshape(classes, width))
    logits = op.add(op.matmul(x, head, False, True), op.constant(graph.weights.take("head.bias", (classes,))))
    graph.weights.require_all_taken()
    return ov.Model([op.softmax(_calibrated(logits, metadata.calibration), 1)], [images], metadata.name)


def _calibrated(logits: ov.Node, calibration: Calibration) -> ov.Node:
    """Put the logits on the curve of ``calibration``, as x (1 / T + c x^2)."""
    x = op.subtract(logits, op.reduce_max(logits, op.constant(np.array([1])), keep_dims=True))
    factor = op.constant(np.float32(1 / calibration.temperature))
    if calibration.cubic:
        factor = op.add(op.multiply(op.multiply(x, x), op.constant(np.float32(calibration.cubic))), factor)
    return op.multiply(x, factor)


class _Weights:
    """The checkpoint's weights, each taken once, by name and expected shape."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._left = dict(weights)

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self._left:
            raise CheckpointError(f"the weights do not fit the architecture: missing {name}")
        value = self._left.pop(name)
        if value.shape != shape:
            raise CheckpointError(f"the weights do not fit the architecture: {name} is {value.shape}, expected {shape}")
        return value.astype(np.float32)

    def require_all_taken(self) -> None:
        if self._left:
            raise CheckpointError(f"the weights do not fit the architecture: unexpected {', '.join(sorted(self._left)[:5])}")


class _Graph:
    """The layers; ``activation_max`` is None for a graph in float.

    Maps of up to ``dense_size`` x ``dense_size`` pixels go from layer to layer as rows, float (N, width * size * size).
    """

    def __init__(self, weights: _Weights, activation_max: Mapping[str, float] | None, dense_size: int) -> None:
        self.weights = weights
        self._activation_max = activation_max
        self._dense_size = dense_size

    def block(self, x: ov.Node, name: str, in_width: int, out_width: int, size: int, stride: int) -> ov.Node:
        """One block on maps of ``size`` x ``size``."""
        shortcut = x
        if stride != 1 or in_width != out_width:
            shortcut = self.conv(x, self.weights.take(f"{name}.projection.weight", (out_width, in_width, 1, 1)), size, stride)
        shape = (out_width, in_width, 3, 3)
        y = self.relu(f"{name}.relu1", self.conv_norm(x, f"{name}.conv1", f"{name}.norm1", shape, size, stride))
        shape = (out_width, out_width, 3, 3)
        y = self.conv_norm(y, f"{name}.conv2", f"{name}.norm2", shape, _halved(size, stride))
        return self.relu(f"{name}.relu2", op.add(y, shortcut))

    def conv_norm(
        self,
        x: ov.Node,
        conv: str,
        norm: str,
        shape: tuple[int, int, int, int],
        size: int,
        stride: int = 1,
        *,
        bias: bool = False,
        quantized: bool = True,
    ) -> ov.Node:
        """One convolution with its batch norm folded in (running statistics, as in eval mode)."""
        width = (shape[0],)
        weight = self.weights.take(f"{conv}.weight", shape)
        gamma, beta = self.weights.take(f"{norm}.weight", width), self.weights.take(f"{norm}.bias", width)
        mean, variance = self.weights.take(f"{norm}.running_mean", width), self.weights.take(f"{norm}.running_var", width)
        scale = gamma / np.sqrt(variance + _NORM_EPSILON)
        shift = beta - mean * scale
        if bias:
            shift = shift + self.weights.take(f"{conv}.bias", width) * scale
        y = self.conv(x, weight * scale.reshape(-1, 1, 1, 1), size, stride, quantized=quantized)
        pixels = _halved(size, stride) ** 2
        return op.add(y, op.constant(np.repeat(shift, pixels) if self._in_rows(y) else shift.reshape(1, -1, 1, 1)))

    def conv(self, x: ov.Node, weight: Array, size: int, stride: int, *, quantized: bool = True) -> ov.Node:
        """One convolution of ``size`` x ``size`` maps, padded by half of its kernel."""
        scale = None
        if quantized and self._activation_max is not None:
            scale = np.maximum(np.abs(weight).max(axis=(1, 2, 3), keepdims=True), 1e-12) / np.float32(127)
            weight = np.round(weight / scale).astype(np.int8)
        if self._in_rows(x):
            pixels = _halved(size, stride) ** 2
            scale = None if scale is None else np.repeat(scale.reshape(-1, 1), pixels, 0)
            matrix = all_taps(weight, size, size, stride).reshape(len(weight) * pixels, -1)
            return op.matmul(x, _scaled(matrix, scale), False, True)
        pad = weight.shape[2] // 2
        y = op.convolution(x, _scaled(weight, scale), [stride, stride], [pad, pad], [pad, pad], [1, 1])
        if _halved(size, stride) <= self._dense_size:
            y = op.reshape(y, op.constant(np.array([0, -1])), special_zero=True)
        return y

    @staticmethod
    def _in_rows(x: ov.Node) -> bool:
        return len(x.get_output_partial_shape(0)) == 2

    def relu(self, name: str, x: ov.Node) -> ov.Node:
        y = op.relu(x)
        if self._activation_max is None:
            return y
        if name not in self._activation_max:
            raise CheckpointError(f"the checkpoint was not calibrated for int8 at {name}; use precision 'fp32' or 'bf16'")
        low, high = op.constant(np.float32(0)), op.constant(np.float32(self._activation_max[name]))
        return op.fake_quantize(y, low, high, low, high, 256)


def _halved(size: int, stride: int) -> int:
    return -(-size // stride)


def _scaled(values: NDArray[Any], scale: Array | None) -> ov.Node:
    """Give float values as they are, and int8 values times their scale."""
    constant = op.constant(values)
    return constant if scale is None else op.multiply(op.convert(constant, ov.Type.f32), op.constant(scale))
