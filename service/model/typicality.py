"""How like the training images an image is, from the features before the network's head.

The distance is that of Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples" (2018): Mahalanobis
to the nearest class mean, with the covariance that all classes share. The features are scaled to length 1 before it, as in
Mueller and Hein, "Mahalanobis++" (2025). A runner makes a typicality of it: the share of held-out images that are further away
(a conformal p-value: Bates et al., "Testing for outliers with conformal p-values", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.model.layers import Array

DEFAULT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Typicality:
    """Everything float32. The squared distance of features f of length 1 is the least ``|whitening f - m|²`` of all means m.

    ``whitening`` is (F, F) and ``means`` (num_classes, F). ``distances`` are those of held-out images: K quantiles of them,
    ascending, at equal shares from the least to the largest.
    """

    whitening: Array
    means: Array
    distances: Array

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by the names under which a checkpoint stores them."""
        return {f"typicality.{name}": getattr(self, name) for name in ("whitening", "means", "distances")}


def take_typicality(weights: dict[str, NDArray[Any]], classes: int) -> Typicality | None:
    """Remove the tensors of a typicality from ``weights``; None where there are none. Raise ValueError for bad ones."""
    found: Mapping[str, Any] = {name: weights.pop(f"typicality.{name}", None) for name in ("whitening", "means", "distances")}
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return None
    if missing:
        raise ValueError(f"the typicality has no {missing[0]}")
    measured = Typicality(**found)
    features = measured.means.shape[-1]
    shapes = measured.whitening.shape, measured.means.shape, measured.distances.shape[1:]
    if shapes != ((features, features), (classes, features), ()) or not measured.distances.size:
        raise ValueError(f"the typicality's shapes {shapes} do not fit {classes} classes")
    for name, value in found.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(f"the typicality's {name} must be finite float32")
    return measured
