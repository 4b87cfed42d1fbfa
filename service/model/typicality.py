"""How like the training images an image is, from the features before the network's head.

The features are scaled to length 1, as in Mueller and Hein, "Mahalanobis++" (2025). Their strangeness has two terms. The first
is the distance of Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples" (2018): Mahalanobis to
the nearest class mean, with the covariance that all classes share. Its few largest variances are kept, the others replaced
by their mean. The second is a linear score that tells images as they are from images turned by 90, 180 or 270 degrees: with
unknown things, a network is less sure which way is up (Hendrycks et al., "Using Self-Supervised Learning Can Improve Model
Robustness and Uncertainty", 2019). A runner makes a typicality of it: the share of held-out images that are stranger, the
image itself among them (a conformal p-value: Bates et al., "Testing for outliers with conformal p-values", 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from service.model.layers import Array

DEFAULT_THRESHOLD = 0.05
Columns = TypeVar("Columns", bound=Any)  # an array of numpy or torch


def split_output(output: Columns, classes: int) -> tuple[Columns, Columns | None]:
    """Return probabilities, (N, classes), and typicality, (N,), of what a classifier or a runner returns.

    The typicality is a column after the classes; None where there is none.
    """
    return output[:, :classes], output[:, classes] if output.shape[1] > classes else None


@dataclass(frozen=True)
class Typicality:
    """Everything float32. With features f, (F,), of length 1 and c = ``centre``, an image is as strange as this number.

    ``min over classes k of (bias_k - weights_k · (f - c)) - |directions (f - c)|²``

    Both terms are of this form, so one product with K + num_classes rows is all there is to calculate. ``centre`` is (F,),
    ``directions`` (K, F), ``weights`` (num_classes, F), ``bias`` (num_classes,). ``strangeness`` is ascending: that
    of held-out images, or of many their quantiles at equal shares, and last a number that is larger than any, for the image
    itself. So of n held-out images no typicality is below 1 / (n + 1).
    """

    centre: Array
    directions: Array
    weights: Array
    bias: Array
    strangeness: Array

    def shapes(self, _size: int, classes: int, features: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array, for that many ``classes`` and ``features``."""
        rows, images = len(np.atleast_1d(self.directions)), max(1, self.strangeness.size)
        shapes = (features,), (rows, features), (classes, features), (classes,), (images,)
        return dict(zip((f"typicality.{name}" for name in vars(self)), shapes, strict=True))
