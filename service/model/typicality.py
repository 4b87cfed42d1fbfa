"""How like the training images an image is, from the features before the network's head.

The features are scaled to length 1, as in Mueller and Hein, "Mahalanobis++" (2025). Their strangeness has two terms. The first
is the distance of Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples" (2018): Mahalanobis to
the nearest class mean, with the covariance that all classes share. Its few largest variances are kept, the others replaced
by their mean. The second is a linear score that tells images as they are from images turned by 90, 180 or 270 degrees: with
unknown things, a network is less sure which way is up (Hendrycks et al., "Using Self-Supervised Learning Can Improve Model
Robustness and Uncertainty", 2019). A runner makes a typicality of it: the share of held-out images that are stranger (a
conformal p-value: Bates et al., "Testing for outliers with conformal p-values", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.model.layers import Array

DEFAULT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Typicality:
    """Everything float32. With features f, (F,), of length 1 and c = ``centre``, an image is as strange as this number.

    ``min over classes k of (bias_k - weights_k · (f - c)) - |directions (f - c)|²``

    Both terms are of this form, so one product with K + num_classes rows is all there is to calculate. ``centre`` is (F,),
    ``directions`` (K, F), ``weights`` (num_classes, F), ``bias`` (num_classes,). ``strangeness`` is that of held-out images:
    quantiles of it, ascending, at equal shares from the least to the largest.
    """

    centre: Array
    directions: Array
    weights: Array
    bias: Array
    strangeness: Array

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by the names under which a checkpoint stores them."""
        return {f"typicality.{name}": getattr(self, name) for name in _NAMES}


_NAMES = tuple(field.name for field in fields(Typicality))


def take_typicality(weights: dict[str, NDArray[Any]], classes: int) -> Typicality | None:
    """Remove the tensors of a typicality from ``weights``; None where there are none. Raise ValueError for bad ones."""
    found: Mapping[str, Any] = {name: weights.pop(f"typicality.{name}", None) for name in _NAMES}
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return None
    if missing:
        raise ValueError(f"the typicality has no {missing[0]}")
    measured = Typicality(**found)
    features = measured.centre.size
    expected = {
        "centre": (features,),
        "directions": (len(np.atleast_1d(measured.directions)), features),
        "weights": (classes, features),
        "bias": (classes,),
        "strangeness": (max(1, measured.strangeness.size),),
    }
    for name, value in found.items():
        if value.shape != expected[name]:
            raise ValueError(f"the typicality's {name} is {value.shape}, expected {expected[name]} for {classes} classes")
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(f"the typicality's {name} must be finite float32")
    return measured
