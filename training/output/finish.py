"""What follows the last epoch: the checkpoint is calibrated, given its known images, and tested."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from service.model.classifier import Classifier, calibrated
from service.model.network import Network, model_from_checkpoint
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerError, RunnerOptions
from training.data.dataset import Dataset
from training.evaluation.calibrate import activation_ranges, expected_calibration_error, fit_calibration, predict_logits
from training.evaluation.canary import choose_canary
from training.evaluation.evaluate import evaluate
from training.evaluation.measurement import TOP5_CLASSES
from training.evaluation.predictor import ClassifierPredictor, RunnerPredictor
from training.evaluation.typicality import fit_typicality, threshold_of
from training.evaluation.unknown import other_images
from training.output.report import write_report

logger = logging.getLogger(__name__)

_CALIBRATION_IMAGES = 1000


def finish(
    path: Path,
    train_data: Dataset,
    validation: Dataset,
    test_data: Dataset,
    data_note: str = "",
    unknown: Dataset | None = None,
) -> Checkpoint:
    """Calibrate the checkpoint at ``path`` as it is stored, in half precision, and measure it on the test set.

    All data is on one device, which does the work. The curve of the logits, the known images and the quantiles of typicality
    come from ``validation``, the int8 ranges and both terms of typicality from ``train_data``. Typicality is measured on noise,
    single colours and ``unknown``, images of other things. Writes the checkpoint, the plots and the model card.
    """
    checkpoint = load_checkpoint(path)
    spec, class_names = checkpoint.metadata.input, checkpoint.metadata.class_names
    device = train_data.images.device
    model: Network = model_from_checkpoint(checkpoint)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form

    logits = predict_logits(model, validation.images, spec)
    calibration = fit_calibration(logits, validation.labels)
    known = calibrated(logits, calibration).softmax(1)
    canary = choose_canary(validation.images, known)
    if canary is None:
        logger.warning("the network is not sure of any validation image; the checkpoint has no known images for the service")
    chosen = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES].to(device)
    maxima = activation_ranges(model, train_data.images[chosen], spec)
    calibration = calibration.model_copy(update={"activation_max": maxima})
    threshold = threshold_of(len(validation))
    metadata = checkpoint.metadata.model_copy(update={"calibration": calibration, "unknown_threshold": threshold})
    typicality = fit_typicality(model, train_data, validation, spec)
    checkpoint = replace(checkpoint, metadata=metadata, canary=canary, typicality=typicality)

    predictor = ClassifierPredictor(Classifier(checkpoint, torch.float32).to(device))
    measured = evaluate(checkpoint, test_data, predictor, tta=True, others=other_images(test_data, unknown))
    plain = measured.plain
    assert measured.tta is not None, "it was asked for"
    metrics: dict[str, Any] = metadata.metrics | {
        "train_images": len(train_data),
        "val_images": len(validation),
        "val_ece": expected_calibration_error(known, validation.labels),
        "test_images": plain.images,
        "test_accuracy": plain.top1,
        "test_balanced_accuracy": plain.balanced,
        **({"test_top5_accuracy": plain.top5} if len(class_names) > TOP5_CLASSES else {}),
        "test_accuracy_tta": measured.tta.top1,
        "test_per_class": plain.per_class,
        "test_ece_before": plain.ece_before,
        "test_ece": plain.ece,
        "unknown": {name: asdict(found) for name, found in measured.unknown.items()},
        "data_note": data_note,
    }
    if importlib.util.find_spec("openvino") is not None:
        checkpoint, metrics = _with_int8(checkpoint, metrics, test_data)
    checkpoint = replace(checkpoint, metadata=checkpoint.metadata.model_copy(update={"metrics": metrics}))
    version = save_checkpoint(
        path, checkpoint.weights, checkpoint.metadata, canary=checkpoint.canary, typicality=checkpoint.typicality
    )
    checkpoint = replace(checkpoint, version=version)
    write_report(path.parent, checkpoint, test_data, measured.predictions, plain)
    figures = f"balanced accuracy {plain.balanced:.1%}, calibration error {plain.ece:.1%}"
    logger.info("of %d test images %.1f %% are right (%s)", plain.images, plain.top1 * 100, figures)
    return checkpoint


def _with_int8(checkpoint: Checkpoint, metrics: dict[str, Any], test_data: Dataset) -> tuple[Checkpoint, dict[str, Any]]:
    """Add the accuracy of the int8 form; where it fails the known images, take its ranges away, so that none serves it."""
    options = RunnerOptions(runtime="openvino", device="cpu", precision="int8")
    try:
        with closing(open_runner(checkpoint, options)) as runner:
            predictions = RunnerPredictor(runner).predict(test_data)
    except RunnerError as error:
        logger.warning("the int8 form is not stored: %s", error)
        calibration = checkpoint.metadata.calibration.model_copy(update={"activation_max": {}})
        return replace(checkpoint, metadata=checkpoint.metadata.model_copy(update={"calibration": calibration})), metrics
    hits = predictions.labels == test_data.labels.cpu()
    return checkpoint, metrics | {"test_accuracy_int8": hits.double().mean().item()}
