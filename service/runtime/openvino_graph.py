"""A network's layers as an OpenVINO graph, from the weights of a checkpoint, without torch.

The graph holds everything from pixels to calibrated probabilities. Its int8 version is made here from the float weights and the
checkpoint's ``activation_max``, so there is no second file that could disagree with the first. Weights are rounded per output
channel to -127..127, the outputs of the ReLUs to 0..255 (Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", 2018). In int8 the first convolution reads the pixels as they are; mean and
deviation are folded into its weights. Its padding has to be the mean and a convolution pads with 0, so images come with a
frame. The head stays in float.

A convolution multiplies as many pixels at once as a row of the map has, on AMX up to 16; in the last stages that is 2 or 4.
With ``batch_last`` the images are a third spatial axis, (1, channels, height, width, N), over which no kernel reaches: each
row is then N pixels long, whatever the map, and none of it is padding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from service.model.checkpoint import Calibration, Checkpoint, CheckpointError
from service.model.images import InputSpec
from service.model.layers import Array, Convolution, Layers, Linear, MaxPool, Mean, Residual, folded
from service.model.typicality import Typicality


def frame_pixel(spec: InputSpec) -> NDArray[np.uint8]:
    """The pixel of the frame around an image, uint8 (3, 1, 1): the mean, which a convolution in float pads with."""
    return np.round(np.asarray(spec.mean).reshape(3, 1, 1) * 255).astype(np.uint8)


def build_graph(checkpoint: Checkpoint, precision: str, *, batch_last: bool = False) -> ov.Model:
    """Build uint8 (N, 3, size, size) to calibrated probabilities, float32 (N, num_classes), for any N.

    A checkpoint with a typicality has it as one more column. ``precision`` is that in which the graph will run: int8, bf16 or
    fp32.

    In int8 the images come with a frame of ``frame_pixel`` on each side, as wide as the first convolution pads: one pixel
    makes them (N, 3, size + 2, size + 2). ``batch_last`` is faster for batches of several small images.

    Raises CheckpointError when int8 is asked of a checkpoint that was not calibrated for it.
    """
    layers, metadata, int8 = checkpoint.layers, checkpoint.metadata, precision == "int8"
    first, *others, head = layers
    assert isinstance(first, Convolution), "a network begins with a convolution"
    assert isinstance(head, Linear), "a network ends in its head"
    size = metadata.input.size + (2 * first.pad if int8 else 0)
    images = op.parameter([-1, 3, size, size], ov.Type.u8, name="images")
    graph = _Graph(checkpoint, int8=int8, batch_last=batch_last)
    features = graph.chain(tuple(others), graph.first(first, images))
    return ov.Model([_outputs(features, head, checkpoint, bf16=precision == "bf16")], [images], metadata.name)


def _outputs(features: ov.Node, head: Linear, checkpoint: Checkpoint, *, bf16: bool) -> ov.Node:
    """Map features, (N, F), to what a runner returns, by one product of matrices.

    Not so in bf16, where OpenVINO rounds products of matrices to 8 bits: projections of 20 would be off by 0.06, and typicality
    by 0.02.
    """
    weight, bias = folded(head, checkpoint.weights)
    fitted, calibration = checkpoint.typicality, checkpoint.metadata.calibration
    if fitted is None:
        return _probabilities(op.matmul(features, op.constant(weight), False, True), bias, calibration)
    projection = np.concatenate([fitted.weights, fitted.directions])
    if bf16:
        products = op.matmul(features, op.constant(weight), False, True)
        projected = op.reduce_sum(op.multiply(op.unsqueeze(features, _axes(1)), op.constant(projection)), _axes(2))
    else:
        both = op.matmul(features, op.constant(np.concatenate([weight, projection])), False, True)
        products, projected = op.variadic_split(both, _axes(1), [len(weight), len(projection)]).outputs()
    length = op.reduce_l2(features, _axes(1), keep_dims=True)
    return op.concat([_probabilities(products, bias, calibration), _typicality(projected, length, fitted)], 1)


def _typicality(projected: ov.Output, length: ov.Node, fitted: Typicality) -> ov.Node:
    """Map the products of features with ``weights`` and ``directions``, and the features' length, to typicality, (N, 1).

    The products are (N, num_classes + K), the length is (N, 1). Dividing by the length and subtracting the centre come after
    the product, since both are linear.
    """
    shift = np.concatenate([fitted.weights @ fitted.centre + fitted.bias, fitted.directions @ fitted.centre])
    unit = op.divide(projected, op.maximum(length, op.constant(np.float32(1e-12))))
    centred = op.subtract(unit, op.constant(shift[np.newaxis]))
    to_classes, to_directions = op.variadic_split(centred, _axes(1), [len(fitted.bias), len(fitted.directions)]).outputs()
    squares = op.reduce_sum(op.multiply(to_directions, to_directions), _axes(1), keep_dims=True)
    strangeness = op.negative(op.add(op.reduce_max(to_classes, _axes(1), keep_dims=True), squares))
    count = len(fitted.strangeness)
    shares = (np.arange(count, -1, -1) / count).astype(np.float32)  # of held-out images, by the number of those less strange
    return op.gather(op.constant(shares), op.bucketize(strangeness, op.constant(fitted.strangeness), "i32"), _axes(0))


def _probabilities(products: ov.Node, bias: Array | None, calibration: Calibration) -> ov.Node:
    """Add the head's bias, put the logits on the curve of ``calibration``, as x (1 / T + c x^2), and take their softmax."""
    logits = op.add(products, op.constant(bias))
    x = op.subtract(logits, op.reduce_max(logits, _axes(1), keep_dims=True))
    cubic, factor = (op.constant(np.float32(value)) for value in (calibration.cubic, 1 / calibration.temperature))
    return op.softmax(op.multiply(x, op.add(op.multiply(op.multiply(x, x), cubic), factor)), 1)


class _Graph:
    """Nodes for layers."""

    def __init__(self, checkpoint: Checkpoint, *, int8: bool, batch_last: bool) -> None:
        self._weights = checkpoint.weights
        self._spec = checkpoint.metadata.input
        self._activation_max = checkpoint.metadata.calibration.activation_max
        self._int8 = int8
        self._batch_last = batch_last

    def first(self, layer: Convolution, images: ov.Node) -> ov.Node:
        """The first convolution with the normalisation of the pixels; in int8 on the pixels as they are, framed."""
        if self._batch_last:
            images = op.unsqueeze(op.transpose(images, _axes(1, 2, 3, 0)), _axes(0))
        weight, bias = folded(layer, self._weights)
        mean, std = (np.asarray(values, np.float32).reshape(1, 3, 1, 1) for values in (self._spec.mean, self._spec.std))
        x = op.multiply(op.convert(images, ov.Type.f32), op.constant(np.float32(1 / 255)))
        if not self._int8:
            x = op.divide(op.subtract(x, self._per_channel(mean)), self._per_channel(std))
            return self._convolution(layer, x, weight, bias)
        kernels, step = _rounded(weight / std)
        shift = (0 if bias is None else bias) - (kernels * step * mean).sum((1, 2, 3))
        return self._convolution(replace(layer, pad=0), x, weight / std, shift)

    def chain(self, layers: Layers, x: ov.Node) -> ov.Node:
        """One layer after the other."""
        for layer in layers:
            match layer:
                case Convolution():
                    x = self._convolution(layer, x, *folded(layer, self._weights))
                case Residual():
                    shortcut = self.chain(layer.shortcut, x)
                    x = self._relu(layer.relu, op.add(self.chain(layer.body, x), shortcut))
                case MaxPool():
                    strides, pads = self._axes_of(layer.stride, 1), self._axes_of(layer.pad, 0)
                    kernel = self._axes_of(layer.kernel, 1)
                    x = op.max_pool(x, strides, [1] * len(pads), pads, pads, kernel).output(0)
                case Mean():
                    x = op.reduce_mean(x, _axes(2, 3))
                    if self._batch_last:
                        x = op.transpose(op.squeeze(x, _axes(0)), _axes(1, 0))
        return x

    def _convolution(self, layer: Convolution, x: ov.Node, weight: Array, bias: Array | None) -> ov.Node:
        """Convolve with ``weight``, in int8 rounded and multiplied by the step of each output channel; then the ReLU."""
        if self._int8:
            kernels, step = (op.constant(self._for_each_image(values)) for values in _rounded(weight))
            filters = op.multiply(op.convert(kernels, ov.Type.f32), step)
        else:
            filters = op.constant(self._for_each_image(weight))
        strides, pads = self._axes_of(layer.stride, 1), self._axes_of(layer.pad, 0)
        y = op.convolution(x, filters, strides, pads, pads, [1] * len(pads))
        y = y if bias is None else op.add(y, self._per_channel(bias))
        return y if layer.relu is None else self._relu(layer.relu, y)

    def _relu(self, relu: str, x: ov.Node) -> ov.Node:
        """The ReLU of that name; in int8 with its output rounded."""
        y = op.relu(x)
        if not self._int8:
            return y
        if relu not in self._activation_max:
            raise CheckpointError(f"the checkpoint was not calibrated for int8 at {relu}; use precision 'fp32' or 'bf16'")
        low, high = op.constant(np.float32(0)), op.constant(np.float32(self._activation_max[relu]))
        return op.fake_quantize(y, low, high, low, high, 256)

    def _axes_of(self, value: int, images: int) -> list[int]:
        """The value for both axes of the map, and ``images`` for the axis of the images, if it is one."""
        return [value, value, images] if self._batch_last else [value, value]

    def _per_channel(self, values: Array) -> ov.Node:
        return op.constant(self._for_each_image(values.reshape(1, -1, 1, 1)))

    def _for_each_image(self, values: NDArray[Any]) -> NDArray[Any]:
        """Add the axis of the images, if these have one, to an array of four axes."""
        return values[..., np.newaxis] if self._batch_last else values


def _axes(*axes: int) -> ov.Node:
    return op.constant(np.array(axes))


def _rounded(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """The weights of a convolution in steps of -127..127, and the step of each output channel, (out, 1, 1, 1)."""
    step = np.maximum(np.abs(weight).max(axis=(1, 2, 3), keepdims=True), 1e-12) / np.float32(127)
    return np.round(weight / step).astype(np.int8), step
