"""How right a model is, and how well it knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.checkpoint import Calibration
from service.model.typicality import split_output
from training.evaluation.calibrate import expected_calibration_error, uncalibrated

TOP5_CLASSES = 5  # with no more classes than this, top-5 accuracy is 1 and not shown


@dataclass(frozen=True)
class Predictions:
    """``probabilities`` is float32 (N, num_classes), calibrated; ``ranking`` int64 of that shape, the best class first.

    ``typicality`` is float32 (N,), 0..1, where the checkpoint has one.
    """

    probabilities: Tensor
    ranking: Tensor
    typicality: Tensor | None = None

    @classmethod
    def of(cls, outputs: Tensor, classes: int | None = None) -> Predictions:
        """Rank probabilities, float (N, num_classes); of equals the first class comes first, as in the service.

        With ``classes`` given, they may be the output of a classifier or a runner, with typicality.
        """
        probabilities, typicality = split_output(outputs.float().cpu(), classes or outputs.shape[1])
        return cls(probabilities, probabilities.argsort(dim=1, descending=True, stable=True), typicality)

    @property
    def labels(self) -> Tensor:
        """The predicted classes, int64 (N,)."""
        return self.ranking[:, 0]


@dataclass(frozen=True)
class Measurement:
    """Shares are 0..1; ``balanced`` is the mean of ``per_class``.

    ``confusion`` is int64 (num_classes, num_classes), true classes in rows, predicted in columns.
    """

    images: int
    top1: float
    top5: float
    balanced: float
    per_class: dict[str, float]
    ece_before: float
    ece: float
    confusion: Tensor


def measure(predictions: Predictions, labels: Tensor, class_names: tuple[str, ...], calibration: Calibration) -> Measurement:
    """Measure calibrated ``predictions`` against ``labels``, int64 (N,).

    ``ece`` is the calibration error of the probabilities, ``ece_before`` that of the plain logits, for which
    ``calibration``, the predictions' own, is undone. ``per_class`` leaves out classes without images.
    """
    labels = labels.cpu()
    classes = len(class_names)
    hits = predictions.ranking == labels[:, None]
    confusion = torch.bincount(labels * classes + predictions.labels, minlength=classes * classes).view(classes, classes)
    counts = confusion.sum(1)
    per_class = {name: (confusion[i, i] / counts[i]).item() for i, name in enumerate(class_names) if counts[i]}
    return Measurement(
        images=len(labels),
        top1=hits[:, 0].double().mean().item(),
        top5=hits[:, :5].any(1).double().mean().item(),
        balanced=sum(per_class.values()) / len(per_class),
        per_class=per_class,
        ece_before=expected_calibration_error(uncalibrated(predictions.probabilities, calibration), labels),
        ece=expected_calibration_error(predictions.probabilities, labels),
        confusion=confusion,
    )
