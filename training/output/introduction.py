"""What a run is about to do, in one paragraph before its first epoch."""

from __future__ import annotations

import re
import statistics
import time

import torch

from service.model.images import InputSpec
from service.model.network import Network
from training.data.dataset import Dataset, Source
from training.data.survey import shorter_sides
from training.evaluation.calibrate import predict_logits
from training.recipes import IMBALANCE, RECIPE_SIZE, Recipe
from training.run.device import device_name

_MOST_CLASSES = 20
_PLURAL = r"(?<=file|mage)s\b"
_MEASURED_BATCH = 64
_STEP_BY_FORWARD = 3.0  # a training step takes about as long as so many forward passes


def introduction(
    recipe: Recipe, source: Source, data: Dataset, validation: Dataset, spec: InputSpec, first_weights: str, seconds: float
) -> str:
    """Return the paragraph: data, what was left out, network, device, steps, and the expected time of ``seconds``.

    ``data`` and ``validation`` are the images that are trained on and held out.
    """
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.class_names)).tolist()
    shown = [f"{name} {count}" for name, count in zip(data.class_names, counts, strict=True)][:_MOST_CLASSES]
    more = f" and {len(counts) - _MOST_CLASSES} more" if len(counts) > _MOST_CLASSES else ""
    left_out = (
        ", ".join(
            f"{count} {re.sub(_PLURAL, '', reason) if count == 1 else reason}"
            for reason, count in sorted(source.left_out.items())
        )
        or "nothing"
    )
    steps = len(data) // recipe.batch_size
    return (
        f"{len(counts)} classes: {', '.join(shown)}{more}. {len(data)} images to train on, {len(validation)} for validation,"
        f" {len(source.test)} for the test{_sizes(data)}. Left out: {left_out}."
        f" Network {recipe.architecture}, first weights {first_weights}, on {device_name(data.images.device)}."
        f" Images of {spec.size} x {spec.size} pixels, batch {recipe.batch_size}, {recipe.epochs} epochs of {steps} steps,"
        f" {recipe.epochs * steps} steps in all: about {_duration(seconds)} where nothing else runs."
    )


def imbalance_warning(data: Dataset, recipe: Recipe) -> str:
    """Return what to know where the classes are so uneven that recipes draw them equally often, else nothing."""
    if data.imbalance <= IMBALANCE:
        return ""
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.class_names))
    present = counts.where(counts > 0, counts.max())
    drawn = "every class is drawn equally often" if recipe.balance_above else "images are drawn as they are"
    return (
        f"uneven classes: {data.class_names[int(counts.argmax())]} has {int(counts.max())} images and"
        f" {data.class_names[int(present.argmin())]} {int(present.min())}; {drawn}. Collect more of the rare ones, and judge by"
        " the balanced accuracy"
    )


def expected_seconds(model: Network, data: Dataset, recipe: Recipe, spec: InputSpec) -> float:
    """Return about how long all epochs take, from the time of forward passes of ``model``, whose weights do not change."""
    images = data.images[: min(_MEASURED_BATCH, recipe.batch_size)]
    for _ in range(2):  # the first one also prepares kernels
        started = time.monotonic()
        predict_logits(model, images, spec, bf16=recipe.precision == "bf16").cpu()
        forward_s = time.monotonic() - started
    shares = [(start, (side / RECIPE_SIZE) ** 2) for start, side in recipe.sizes] or [(0.0, 1.0)]
    ends = [start for start, _ in shares[1:]] + [1.0]
    area = sum((end - start) * share for (start, share), end in zip(shares, ends, strict=True))
    return forward_s / len(images) * len(data) * recipe.epochs * area * _STEP_BY_FORWARD


def _sizes(data: Dataset) -> str:
    sides = shorter_sides(data.paths)
    return f" (the shorter side: median {statistics.median(sides):.0f} pixels, {min(sides)} to {max(sides)})" if sides else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
