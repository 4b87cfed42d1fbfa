"""Any checkpoint on any data: how right it is, and how well it knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from service.model.checkpoint import Checkpoint
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from training.data.dataset import Dataset
from training.errors import EvaluationError
from training.evaluation.measurement import TOP5_CLASSES, Measurement, Predictions, measure
from training.evaluation.predictor import Predictor, RunnerPredictor, average
from training.evaluation.unknown import Detection, detection

Others = Mapping[str, Dataset]

_SHOWN_CLASSES = 30  # with more, the worst ones
_SHOWN_CONFUSIONS = 10


@dataclass(frozen=True)
class Evaluation:
    """What one predictor, ``name``, reached; ``tta`` with an image and its mirror image averaged, if that was asked for.

    ``unknown`` is how well typicality tells the data from images of other things, by what these are.
    """

    name: str
    class_names: tuple[str, ...]
    predictions: Predictions
    plain: Measurement
    tta: Measurement | None
    unknown: dict[str, Detection] = field(default_factory=dict)


def evaluate(
    checkpoint: Checkpoint, data: Dataset, predictor: Predictor, *, tta: bool = False, others: Others = MappingProxyType({})
) -> Evaluation:
    """Measure ``predictor``, which answers for ``checkpoint``, on ``data``, whose classes are the checkpoint's.

    Typicality is measured against images of ``others`` by what they are; their labels do not count. Raises EvaluationError
    for a model without typicality then.
    """
    calibration, names = checkpoint.metadata.calibration, checkpoint.metadata.class_names
    predictions = predictor.predict(data)
    averaged = None
    if tta:
        mirrored = predictor.predict(data.mirrored())
        averaged = measure(average(predictions, mirrored), data.labels, names, calibration)
    detections = {}
    for kind, images in others.items():
        typicality = predictor.predict(images).typicality
        if predictions.typicality is None or typicality is None:
            raise EvaluationError("the checkpoint has no typicality; add one by 'python -m training calibrate'")
        detections[kind] = detection(predictions.typicality, typicality, checkpoint.metadata.unknown_threshold)
    plain = measure(predictions, data.labels, names, calibration)
    return Evaluation(predictor.name, names, predictions, plain, averaged, detections)


def evaluate_runners(
    checkpoint: Checkpoint, precisions: Sequence[str], options: RunnerOptions, measure: Callable[[Predictor], Evaluation]
) -> list[Evaluation]:
    """Measure the checkpoint in each of ``precisions``; raise RunnerError where the runtime cannot have one."""
    evaluations = []
    for precision in precisions:
        with closing(open_runner(checkpoint, replace(options, precision=precision))) as runner:
            evaluations.append(measure(RunnerPredictor(runner)))
    return evaluations


def as_table(evaluations: Sequence[Evaluation]) -> str:
    """Return the evaluations side by side, one column each, in percent."""
    first = evaluations[0]
    rows: list[tuple[str, list[str]]] = [("", [evaluation.name for evaluation in evaluations])]

    def row(title: str, shares: Sequence[float]) -> None:
        rows.append((title, [f"{share * 100:.2f} %" for share in shares]))

    row("top-1 accuracy", [evaluation.plain.top1 for evaluation in evaluations])
    row("balanced accuracy", [evaluation.plain.balanced for evaluation in evaluations])
    has_top5 = len(first.plain.confusion) > TOP5_CLASSES
    if has_top5:
        row("top-5 accuracy", [evaluation.plain.top5 for evaluation in evaluations])
    averaged = [evaluation.tta for evaluation in evaluations if evaluation.tta is not None]
    if averaged:
        row("top-1, mirror image averaged in", [measurement.top1 for measurement in averaged])
        if has_top5:
            row("top-5, mirror image averaged in", [measurement.top5 for measurement in averaged])
    row("calibration error of the plain logits", [evaluation.plain.ece_before for evaluation in evaluations])
    row("calibration error", [evaluation.plain.ece for evaluation in evaluations])
    worst = sorted(first.plain.per_class, key=lambda name: first.plain.per_class[name])[:_SHOWN_CLASSES]
    for name in first.plain.per_class if len(first.plain.per_class) <= _SHOWN_CLASSES else worst:
        row(f"accuracy of {name}", [evaluation.plain.per_class[name] for evaluation in evaluations])
    for name in first.unknown:
        detections = [evaluation.unknown[name] for evaluation in evaluations]
        row(f"{name}: area under ROC", [found.auroc for found in detections])
        row(f"{name}: taken for known where 95 % of the data is", [found.fpr95 for found in detections])
        row(f"{name}: below the threshold", [found.flagged for found in detections])
    if first.unknown:
        row("data below the threshold", [next(iter(evaluation.unknown.values())).data_flagged for evaluation in evaluations])
    if len(evaluations) > 1:
        row(f"same class as {first.name}", [_agreement(first, evaluation) for evaluation in evaluations])
        typicality = [found.predictions.typicality for found in evaluations]
        distances = [
            (values - typicality[0]).abs() for values in typicality if values is not None and typicality[0] is not None
        ]
        if distances:
            row(f"typicality: mean distance to {first.name}", [float(distance.mean()) for distance in distances])
            row(f"typicality: largest distance to {first.name}", [float(distance.max()) for distance in distances])
    title_width = max(len(title) for title, _ in rows)
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(evaluations))]
    lines = [
        "  ".join([title.ljust(title_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for title, cells in rows
    ]
    if mixed_up := confusions(first.plain, first.class_names):
        lines += ["", f"most frequent errors of {first.name}: {', '.join(mixed_up)}"]
    return "\n".join(lines)


def confusions(measurement: Measurement, class_names: Sequence[str]) -> list[str]:
    """Return the most frequent pairs of true and predicted class, at most ten, each with its number of images."""
    wrong = measurement.confusion.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(_SHOWN_CONFUSIONS, len(wrong)))
    classes = len(class_names)
    return [
        f"{class_names[place // classes]} as {class_names[place % classes]} {count}"
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    ]


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Return the same figures for programs; shares are 0..1."""
    result: dict[str, Any] = {"name": evaluation.name, "images": evaluation.plain.images}
    for prefix, measurement in (("", evaluation.plain), ("tta_", evaluation.tta)):
        if measurement is not None:
            figures = vars(measurement) | {"confusion": measurement.confusion.tolist()}
            result |= {f"{prefix}{name}": figure for name, figure in figures.items() if name != "images"}
    if evaluation.unknown:
        result["unknown"] = {name: asdict(found) for name, found in evaluation.unknown.items()}
    return result


def _agreement(first: Evaluation, second: Evaluation) -> float:
    return (first.predictions.labels == second.predictions.labels).double().mean().item()
