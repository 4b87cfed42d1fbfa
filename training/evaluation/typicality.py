"""Fitting of typicality: what the training images have in common, and how far from it held-out ones are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from service.model.classifier import TypicalityTail
from service.model.images import InputSpec
from service.model.network import Network
from service.model.typicality import Typicality
from training.data.augment import normalise
from training.data.dataset import Dataset
from training.evaluation.calibrate import images_at_once

_SHRINKAGE = 1e-3  # of the mean variance, added to every variance
_QUANTILES = 1001
_DIFFERENCES = 25_000_000  # float32, at once


@torch.inference_mode()
def predict_features(model: Network, images: Tensor, spec: InputSpec) -> Tensor:
    """Return what the head of ``model``, in eval mode, reads of uint8 images (N, 3, size, size): float32 (N, F)."""
    batches = images.split(images_at_once(images))
    return torch.cat([model.features(normalise(batch, spec)).flatten(1).float() for batch in batches])


@torch.inference_mode()
def typicality_of(features: Tensor, typicality: Typicality) -> Tensor:
    """Return the typicality, float32 (N,), of features, float (N, F)."""
    tail = TypicalityTail(typicality)
    return torch.cat([tail(part).flatten() for part in in_parts(features, typicality)])


def in_parts(features: Tensor, typicality: Typicality) -> tuple[Tensor, ...]:
    """Split features, float (N, F), so that their differences from all means of classes take 100 MB, on the CPU."""
    return torch.split(features.cpu(), max(1, _DIFFERENCES // typicality.means.size))


def fit_typicality(model: Network, train_data: Dataset, validation: Dataset, spec: InputSpec) -> Typicality:
    """Fit class means and shared covariance on ``train_data``, the distances on ``validation``, which training did not see."""
    held_out = predict_features(model, validation.images, spec)
    return fit_from_features(predict_features(model, train_data.images, spec), train_data.labels, held_out)


def fit_from_features(features: Tensor, labels: Tensor, held_out: Tensor) -> Typicality:
    """Fit to training features, float (N, F), of ``labels``, int64 (N,) with every class, and held-out features (M, F)."""
    unit, labels = F.normalize(features.double().cpu()), labels.cpu()
    means = torch.stack([unit[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    centred = unit - means[labels]
    covariance = centred.T @ centred / len(centred)
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0) + max(_SHRINKAGE * float(variances.mean()), 1e-12)
    whitening = (directions / variances.sqrt()).T
    fitted = Typicality(
        whitening.float().contiguous().numpy(),
        (means @ whitening.T).float().numpy(),
        torch.zeros(1).numpy(),
    )
    distances = torch.cat([TypicalityTail(fitted).distance(part).flatten() for part in in_parts(held_out, fitted)]).double()
    quantiles = torch.quantile(distances, torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)).float()
    return Typicality(fitted.whitening, fitted.means, quantiles.numpy())
