"""The network of ``service.model.network`` as an OpenVINO graph, built from a checkpoint's weights without torch.

Owns: folding batch norms into convolutions, the int8 form, normalisation and calibrated softmax inside the graph.
Does not know: devices, threads, batches.

The int8 form is made here from the float weights and the checkpoint's ``activation_max``, so there is no second file that
could disagree with the first: weights are rounded per output channel to -127..127, the outputs of the ReLUs to 0..255
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
The stem takes the pixels as they are, with mean and deviation folded into its weights; its padding, which has to be the
mean, comes with the image, since a convolution pads with 0. The head stays in float.

A convolution multiplies as many pixels at once as a row of the map has, on AMX up to 16; in the last stages that is 2 or 4.
With ``batch_last`` the images are a third spatial axis, (1, channels, height, width, N), over which no kernel reaches: each
row is then N pixels long, whatever the map, and none of it is padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from service.model.checkpoint import Calibration, Checkpoint, CheckpointError
from service.model.images import InputSpec

Array = NDArray[np.float32]
_FRAME = 1  # pixels on each side that the stem's 3x3 kernel reaches beyond the image
_NORM_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default


def frame_pixel(spec: InputSpec) -> NDArray[np.uint8]:
    """Give the pixel of the frame around an image, uint8 (3, 1, 1): the mean, which a float stem pads with."""
    return np.round(np.asarray(spec.mean).reshape(3, 1, 1) * 255).astype(np.uint8)


def build_graph(checkpoint: Checkpoint, *, int8: bool, batch_last: bool = False) -> ov.Model:
    """Build uint8 (N, 3, size, size) to calibrated probabilities, float32 (N, num_classes), for any N.

    With ``int8`` the images come with a frame of one pixel, ``frame_pixel``, on each side: (N, 3, size + 2, size + 2).
    ``batch_last`` is the form for batches of several images.

    Raises CheckpointError when a weight is missing, unexpected or of another shape, or when ``int8`` is asked of a
    checkpoint that was not calibrated for it.
    """
    metadata = checkpoint.metadata
    if metadata.architecture != "resnet18":
        raise CheckpointError(f"the OpenVINO runtime does not know architecture {metadata.architecture!r}; use runtime 'torch'")
    activation_max = metadata.calibration.activation_max if int8 else None
    graph = _Graph(_Weights(checkpoint.weights), activation_max, batch_last=batch_last)
    config, spec = metadata.config, metadata.input
    size = spec.size + 2 * _FRAME if int8 else spec.size
    images = op.parameter([-1, 3, size, size], ov.Type.u8, name="images")
    try:
        width = config["stem_width"]
        x = graph.relu("stem.2", graph.stem(images, spec, width))
        for stage, (out, depth) in enumerate(zip(config["widths"], config["depths"], strict=True)):
            for block in range(depth):
                x = graph.block(x, f"stages.{stage}.{block}", width, out, stride=2 if block == 0 else 1)
                width = out
        classes = config["num_classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the checkpoint's architecture config is incomplete; export it again") from error
    logits = graph.head(x, width, classes)
    graph.weights.require_all_taken()
    return ov.Model([op.softmax(_calibrated(logits, metadata.calibration), 1)], [images], metadata.name)


def _calibrated(logits: ov.Node, calibration: Calibration) -> ov.Node:
    """Put the logits on the curve of ``calibration``, as x (1 / T + c x^2)."""
    x = op.subtract(logits, op.reduce_max(logits, _axes(1), keep_dims=True))
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
    """The layers; ``activation_max`` is None for a graph in float."""

    def __init__(self, weights: _Weights, activation_max: Mapping[str, float] | None, *, batch_last: bool) -> None:
        self.weights = weights
        self._activation_max = activation_max
        self._batch_last = batch_last

    def stem(self, images: ov.Node, spec: InputSpec, width: int) -> ov.Node:
        """The first convolution; with ``activation_max`` on the pixels as they are, which have to come framed."""
        if self._batch_last:
            images = op.unsqueeze(op.transpose(images, _axes(1, 2, 3, 0)), _axes(0))
        weight, shift = self._folded("stem.0", "stem.1", (width, 3, 3, 3), bias=True)
        mean, std = (np.asarray(values, np.float32).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
        x = op.multiply(op.convert(images, ov.Type.f32), op.constant(np.float32(1 / 255)))
        if self._activation_max is None:
            x = op.divide(op.subtract(x, self._per_channel(mean)), self._per_channel(std))
            y = self._convolution(x, weight, None, stride=1, pad=_FRAME)
        else:
            kernels, step = _rounded(weight / std)
            shift = shift - (kernels * step * mean).sum((1, 2, 3))
            y = self._convolution(x, kernels, step, stride=1, pad=0)
        return op.add(y, self._per_channel(shift))

    def block(self, x: ov.Node, name: str, in_width: int, out_width: int, stride: int) -> ov.Node:
        """One block."""
        shortcut = x
        if stride != 1 or in_width != out_width:
            shortcut = self.conv(x, self.weights.take(f"{name}.projection.weight", (out_width, in_width, 1, 1)), stride)
        shape = (out_width, in_width, 3, 3)
        y = self.relu(f"{name}.relu1", self.conv_norm(x, f"{name}.conv1", f"{name}.norm1", shape, stride))
        y = self.conv_norm(y, f"{name}.conv2", f"{name}.norm2", (out_width, out_width, 3, 3))
        return self.relu(f"{name}.relu2", op.add(y, shortcut))

    def conv_norm(self, x: ov.Node, conv: str, norm: str, shape: tuple[int, int, int, int], stride: int = 1) -> ov.Node:
        """One convolution and its batch norm."""
        weight, shift = self._folded(conv, norm, shape)
        return op.add(self.conv(x, weight, stride), self._per_channel(shift))

    def conv(self, x: ov.Node, weight: Array, stride: int) -> ov.Node:
        """One convolution, padded by half of its kernel."""
        kernels, step = (weight, None) if self._activation_max is None else _rounded(weight)
        return self._convolution(x, kernels, step, stride, pad=weight.shape[2] // 2)

    def head(self, x: ov.Node, width: int, classes: int) -> ov.Node:
        """The mean over the pixels, and logits, float32 (N, classes)."""
        weight = self.weights.take("head.weight", (classes, width, 1, 1)).reshape(classes, width)
        x = op.reduce_mean(x, _axes(2, 3))
        if self._batch_last:
            x = op.squeeze(x, _axes(0))
        logits = op.matmul(x, op.constant(weight), self._batch_last, True)
        return op.add(logits, op.constant(self.weights.take("head.bias", (classes,))))

    def _folded(self, conv: str, norm: str, shape: tuple[int, int, int, int], *, bias: bool = False) -> tuple[Array, Array]:
        """Take a convolution's weights and its shift with the batch norm folded in (running statistics, as in eval mode)."""
        width = (shape[0],)
        weight = self.weights.take(f"{conv}.weight", shape)
        gamma, beta = self.weights.take(f"{norm}.weight", width), self.weights.take(f"{norm}.bias", width)
        mean, variance = self.weights.take(f"{norm}.running_mean", width), self.weights.take(f"{norm}.running_var", width)
        scale = gamma / np.sqrt(variance + _NORM_EPSILON)
        shift = beta - mean * scale
        if bias:
            shift = shift + self.weights.take(f"{conv}.bias", width) * scale
        return weight * scale.reshape(-1, 1, 1, 1), shift

    def _convolution(self, x: ov.Node, kernels: NDArray[Any], step: Array | None, stride: int, pad: int) -> ov.Node:
        """Convolve with float ``kernels``, or with int8 ones that are to be multiplied by ``step``."""
        weight = op.constant(self._for_each_image(kernels))
        if step is not None:
            weight = op.multiply(op.convert(weight, ov.Type.f32), op.constant(self._for_each_image(step)))
        strides, pads = [stride, stride], [pad, pad]
        if self._batch_last:
            strides, pads = [*strides, 1], [*pads, 0]
        return op.convolution(x, weight, strides, pads, pads, [1] * len(pads))

    def _per_channel(self, values: Array) -> ov.Node:
        return op.constant(self._for_each_image(values.reshape(1, -1, 1, 1)))

    def _for_each_image(self, values: NDArray[Any]) -> NDArray[Any]:
        """Add the axis of the images, if these have one, to an array of four axes."""
        return values[..., np.newaxis] if self._batch_last else values

    def relu(self, name: str, x: ov.Node) -> ov.Node:
        y = op.relu(x)
        if self._activation_max is None:
            return y
        if name not in self._activation_max:
            raise CheckpointError(f"the checkpoint was not calibrated for int8 at {name}; use precision 'fp32' or 'bf16'")
        low, high = op.constant(np.float32(0)), op.constant(np.float32(self._activation_max[name]))
        return op.fake_quantize(y, low, high, low, high, 256)


def _axes(*axes: int) -> ov.Node:
    return op.constant(np.array(axes))


def _rounded(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Give the weights of a convolution in steps of -127..127, and the step of each output channel, (out, 1, 1, 1)."""
    step = np.maximum(np.abs(weight).max(axis=(1, 2, 3), keepdims=True), 1e-12) / np.float32(127)
    return np.round(weight / step).astype(np.int8), step
