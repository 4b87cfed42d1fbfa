"""Calibration of a trained network: temperature, calibration error, int8 ranges.

Owns: what is measured after training and stored in the checkpoint. Does not know: files, recipes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.images import InputSpec
from training.augment import normalise


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, spec: InputSpec, *, bf16: bool = False, batch_size: int = 500) -> Tensor:
    """Give float32 logits (N, num_classes) of ``model`` in eval mode for uint8 images (N, 3, size, size) on its device."""
    training = model.training
    model.eval()
    logits = []
    for batch in images.split(batch_size):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            logits.append(model(normalise(batch, spec)).float())
    model.train(training)
    return torch.cat(logits)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Give the temperature with the least negative log-likelihood (Guo et al. 2017, section 4.2).

    ``logits`` is float (N, num_classes), ``labels`` int64 (N,). Targets are softened by 1/(N + 2), as in Platt's
    "Probabilistic Outputs for Support Vector Machines" (1999, section 2.2): a few images, all of them right, are no reason
    for scores of exactly 1. The likelihood is convex in 1/T, so a golden-section search over log T in 1/20 .. 20 finds it.
    """
    softening = 1 / (len(labels) + 2)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_temperature), labels, label_smoothing=softening).item()

    low, high = math.log(1 / 20), math.log(20)
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    while high - low > 1e-4:
        if loss_a < loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    return math.exp((low + high) / 2)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Give the mean gap of confidence and accuracy over equal-width bins, weighted by their images (Guo et al. 2017, eq. 3).

    ``probabilities`` is float (N, num_classes), ``labels`` int64 (N,); the result is in 0..1.
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == labels).double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index.cpu(), (confidence - correct).cpu())
    return float(gap.abs().sum() / len(labels))


@torch.inference_mode()
def activation_ranges(model: nn.Module, images: Tensor, spec: InputSpec) -> tuple[dict[str, float], dict[str, float]]:
    """Give the largest output of every ReLU over uint8 images (N, 3, size, size), and its 99.99th percentile, by name.

    The percentile is the mean of those of the batches: one over all outputs would need gigabytes.
    """
    maxima: dict[str, float] = {}
    percentiles: dict[str, list[float]] = {}

    def watch(name: str) -> object:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            maxima[name] = max(maxima.get(name, 0.0), output.max().item())
            rank = max(1, round(output.numel() * 1e-4))
            percentiles.setdefault(name, []).append(output.flatten().topk(rank).values[-1].item())

        return hook

    hooks = [
        module.register_forward_hook(watch(name))  # type: ignore[arg-type]  # the hook's own type is private to torch
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        predict_logits(model, images, spec, batch_size=100)
    finally:
        for hook in hooks:
            hook.remove()
    return maxima, {name: sum(values) / len(values) for name, values in percentiles.items()}
