"""Fitting of typicality: what the training images have in common, and how strange held-out ones are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.classifier import TypicalityTail
from service.model.images import InputSpec
from service.model.network import Network
from service.model.typicality import DEFAULT_THRESHOLD, Typicality
from training.data.augment import normalise
from training.data.dataset import Dataset
from training.evaluation.calibrate import images_at_once
from training.evaluation.unknown import detection

_DIRECTIONS = 64  # of the largest variances, each with its own
_QUANTILES = 1000
_TURNED_IMAGES = 10_000


@torch.no_grad()
def predict_features(model: Network, images: Tensor, spec: InputSpec) -> Tensor:
    """Return what the head of ``model``, in eval mode, reads of uint8 images (N, 3, size, size): float32 (N, F)."""
    batches = images.split(images_at_once(images))
    return torch.cat([model.to_features(normalise(batch, spec)).flatten(1).float() for batch in batches])


def turned(images: Tensor) -> Tensor:
    """Return square images (N, C, size, size), each turned by 90, 180 or 270 degrees."""
    result = images.clone()
    for quarters in (1, 2, 3):
        result[quarters - 1 :: 3] = images[quarters - 1 :: 3].rot90(quarters, (2, 3))
    return result


def fit_typicality(model: Network, train_data: Dataset, validation: Dataset, spec: InputSpec) -> Typicality:
    """Fit both terms of the strangeness on ``train_data``; ``validation`` gives their scale and the p-values.

    Training did not see ``validation``.
    """
    chosen = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))[:_TURNED_IMAGES]
    features, turned_features, held_out, turned_held_out = (
        predict_features(model, images, spec).cpu()
        for images in (
            train_data.images,
            turned(train_data.images[chosen.to(train_data.images.device)]),
            validation.images,
            turned(validation.images),
        )
    )
    labels, classes = train_data.labels.cpu(), len(train_data.class_names)
    return fit_from_features(features, labels, classes, turned_features, held_out, turned_held_out)


def fit_from_features(
    features: Tensor, labels: Tensor, classes: int, turned_features: Tensor, held_out: Tensor, turned_held_out: Tensor
) -> Typicality:
    """Fit to features, float (N, F), of training images of ``labels``, int64 (N,), and of held-out images.

    Some of both are of turned images. A class without an image gets the mean of all. Each term of the strangeness has a
    standard deviation of 1 over the held-out images; the second is then weighted by how well it tells these from turned ones.
    """
    unit, unit_turned, known, known_turned = (
        F.normalize(values.double()) for values in (features, turned_features, held_out, turned_held_out)
    )
    centre = unit.mean(0)
    unit, unit_turned = unit - centre, unit_turned - centre
    counts = torch.bincount(labels, minlength=classes)[:, None]
    means = torch.zeros(classes, unit.shape[1], dtype=unit.dtype).index_add_(0, labels, unit) / counts.clamp(min=1)
    variances, vectors = torch.linalg.eigh(_covariance(unit - means[labels]))
    kept = min(_DIRECTIONS, len(variances) // 2)
    other = variances[:-kept].mean().clamp(min=1e-9)
    directions = (vectors[:, -kept:] * (1 / other - 1 / variances[-kept:].clamp(min=1e-9)).clamp(min=0).sqrt()).T

    # |f - m|² / other - |directions (f - m)|², where f has length 1, so that |f - centre|² is linear in f.
    weights = 2 * (means + centre) / other - 2 * means @ directions.T @ directions
    bias = (1 - centre.square().sum() + means.square().sum(1)) / other - (means @ directions.T).square().sum(1)
    fitted = _float32(centre, directions, weights, bias)
    spread = TypicalityTail(fitted).strangeness(known.float()).double().std().clamp(min=1e-9)

    covariance = (_covariance(unit - unit.mean(0)) + _covariance(unit_turned - unit_turned.mean(0))) / 2
    ridge = torch.eye(len(covariance), dtype=covariance.dtype) * covariance.diagonal().mean().clamp(min=1e-9)
    upright = torch.linalg.solve(covariance + ridge, unit.mean(0) - unit_turned.mean(0))
    sure, sure_turned = ((values - centre) @ upright for values in (known, known_turned))
    told_apart = max(0.0, 2 * detection(sure, sure_turned, 0.0).auroc - 1)
    upright *= told_apart / sure.std().clamp(min=1e-9)

    fitted = _float32(centre, directions / spread.sqrt(), weights / spread + upright, bias / spread)
    strangeness = TypicalityTail(fitted).strangeness(known.float()).flatten()
    return replace(fitted, strangeness=_quantiles(strangeness).numpy())


def threshold_of(images: int) -> float:
    """Return the threshold of a checkpoint with so many held-out images; of few, what is stranger than all is not known.

    Their smallest p-value, 1 / (n + 1), would never be below the usual threshold.
    """
    return DEFAULT_THRESHOLD if images >= 1 / DEFAULT_THRESHOLD else 1.5 / (images + 1)


def _quantiles(strangeness: Tensor) -> Tensor:
    """Return ``Typicality.strangeness`` for n held-out images of this strangeness, float32 (n,).

    The share of it that is at least s is the conformal p-value of s (Bates et al. 2023): (1 + the number of held-out images at
    least as strange) / (n + 1). For more than ``_QUANTILES`` images it is at most 1 / (``_QUANTILES`` + 1) larger.
    """
    images = len(strangeness)
    kept = min(images, _QUANTILES)
    ranks = [-(-(images + 1) * rank // (kept + 1)) for rank in range(1, kept + 1)]
    largest = strangeness.new_tensor([torch.finfo(torch.float32).max])
    return torch.cat([strangeness.sort().values[torch.tensor(ranks) - 1], largest])


def _covariance(centred: Tensor) -> Tensor:
    """Return the covariance, (F, F), of float64 (N, F) whose mean is 0."""
    return centred.T @ centred / len(centred)


def _float32(*arrays: Tensor) -> Typicality:
    """Return centre, directions, weights and bias as a typicality without quantiles."""
    centre, directions, weights, bias = (array.float().contiguous().numpy() for array in arrays)
    return Typicality(centre, directions, weights, bias, np.zeros(1, np.float32))
