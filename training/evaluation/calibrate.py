"""Calibration of a trained network: the curve of its logits, calibration error, int8 ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.checkpoint import Calibration
from service.model.classifier import calibrated
from service.model.images import InputSpec
from training.data.augment import normalise

_PRIOR = 0.35  # of the logarithm of a network's temperature: two thirds of them within 0.7 and 1.4
_LEAST_IMAGES_FOR_CURVE = 100
_PIXELS_AT_ONCE = {"cpu": 500 * 32 * 32, "cuda": 2500 * 32 * 32}


def images_at_once(images: Tensor) -> int:
    """Return how many of these images, (N, 3, size, size), a network can take at once without gigabytes of activations."""
    return max(1, _PIXELS_AT_ONCE[images.device.type] // (images.shape[-1] * images.shape[-2]))


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, spec: InputSpec, *, bf16: bool = False) -> Tensor:
    """Return float32 logits (N, num_classes) of ``model`` in eval mode for uint8 images (N, 3, size, size) on its device."""
    training = model.training
    model.eval()
    logits = []
    for batch in images.split(images_at_once(images)):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            logits.append(model(normalise(batch, spec)).float())
    model.train(training)
    return torch.cat(logits)


def fit_calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """Return the temperature, and the cubic term where it pays, that these images speak for.

    ``logits`` is float (N, num_classes), ``labels`` int64 (N,). A temperature alone is the most probable one after a normal
    prior on its logarithm, of mean 0 and deviation ``_PRIOR``: a handful of images, all of them right, are no reason for scores
    of exactly 1, nor are two mistakes among them one for scores that are all alike; among hundreds it no longer matters.

    From ``_LEAST_IMAGES_FOR_CURVE`` images on, temperature and cubic term are fitted by likelihood, to targets softened by
    1/(N + 2), as in Platt's "Probabilistic Outputs for Support Vector Machines" (1999, section 2.2). It is convex in
    1/temperature and cubic together, so a golden-section search over the one inside a search over the other finds its
    minimum; 1/20 to 20 is searched for the temperature. The cubic term pays if it lifts the log-likelihood of all images by
    more than log(N) / 2 (Schwarz, "Estimating the Dimension of a Model", 1978).
    """
    logits, labels = logits.double().cpu(), labels.cpu()

    def loss(calibration: Calibration, softening: float) -> float:
        return F.cross_entropy(calibrated(logits, calibration), labels, label_smoothing=softening, reduction="sum").item()

    def softened(calibration: Calibration) -> float:
        return loss(calibration, 1 / (len(labels) + 2))

    def after_prior(calibration: Calibration) -> float:
        return loss(calibration, 0.0) + (math.log(calibration.temperature) / _PRIOR) ** 2 / 2

    def fitted(cubic: float, objective: Callable[[Calibration], float]) -> Calibration:
        def with_temperature(log: float) -> Calibration:
            return Calibration(temperature=math.exp(log), cubic=cubic)

        return with_temperature(_minimum(lambda log: objective(with_temperature(log)), -math.log(20), math.log(20)))

    if len(labels) >= _LEAST_IMAGES_FOR_CURVE:
        plain = fitted(0.0, softened)
        unit = plain.temperature**-3  # the cubic term that is 1 where the plain curve is 1
        log = _minimum(lambda log: softened(fitted(unit * math.exp(log), softened)), math.log(1e-4), math.log(100))
        curved = fitted(unit * math.exp(log), softened)
        if softened(plain) - softened(curved) > math.log(len(labels)) / 2:
            return curved
    return fitted(0.0, after_prior)


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where in ``low`` to ``high`` a function that falls and then rises is least, to 1e-4, by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    value_a, value_b = function(a), function(b)
    while high - low > 1e-4:
        if value_a < value_b:
            high, b, value_b = b, a, value_a
            a = high - ratio * (high - low)
            value_a = function(a)
        else:
            low, a, value_a = a, b, value_b
            b = low + ratio * (high - low)
            value_b = function(b)
    return (low + high) / 2


def uncalibrated(probabilities: Tensor, calibration: Calibration) -> Tensor:
    """Return the softmax of the plain logits, float64 (N, num_classes), from calibrated ``probabilities`` of that shape.

    The logarithm of a score is a logit behind the curve, but for what all classes have in common; the curve is undone by the
    root of the cubic x / T + c x^3 = y, which is 2 s sinh(asinh(3 T y / 2s) / 3) with s = 1 / sqrt(3 T c).
    """
    curved = probabilities.double().log()
    curved = curved - curved.amax(1, keepdim=True)
    temperature, cubic = calibration.temperature, calibration.cubic
    if not cubic:
        return (curved * temperature).softmax(1)
    s = 1 / math.sqrt(3 * temperature * cubic)
    return (2 * s * ((1.5 * temperature / s * curved).asinh() / 3).sinh()).softmax(1)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the mean gap of confidence and accuracy over equal-width bins, weighted by their images (Guo et al. 2017, eq. 3).

    ``probabilities`` is float (N, num_classes), ``labels`` int64 (N,); the result is in 0..1.
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == labels).double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index.cpu(), (confidence - correct).cpu())
    return float(gap.abs().sum() / len(labels))


@torch.inference_mode()
def activation_ranges(model: nn.Module, images: Tensor, spec: InputSpec) -> dict[str, float]:
    """Return the largest output of every ReLU over uint8 images (N, 3, size, size), by name."""
    maxima: dict[str, float] = {}

    def watch(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maxima[name] = max(maxima.get(name, 0.0), output.max().item())

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.ReLU):
                hooks.enter_context(module.register_forward_hook(partial(watch, name)))
        predict_logits(model, images, spec)
    return maxima
