"""A checkpoint in the form other runtimes take: ONNX, checked against the network it was made from."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from service.model.atomic_file import replacing
from service.model.checkpoint import Checkpoint
from service.model.classifier import Classifier
from training.errors import ExportError

logger = logging.getLogger(__name__)

_OPSET = 18
_TOLERANCE = 1e-4  # of a probability, in float32
_TYPICALITY_TOLERANCE = 1e-2
_BATCHES = (1, 2, 7)


def export_onnx(checkpoint: Checkpoint, path: Path) -> float:
    """Write the checkpoint as one ONNX file; return the largest difference of a probability in ONNX Runtime.

    Input ``images`` is uint8 (N, 3, size, size), output ``probabilities`` float32 (N, num_classes), calibrated, and
    with one more column for the typicality of a checkpoint that has it: what a runner takes and returns. Class names and
    version are in the file's metadata. Raises ExportError when ONNX Runtime differs from torch, and writes nothing then.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} not installed; install with 'pip install .[onnx]'")
    import onnx

    classifier = Classifier(checkpoint, torch.float32)
    spec = checkpoint.metadata.input
    example = torch.zeros(2, 3, spec.size, spec.size, dtype=torch.uint8)
    for name in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every pass over the graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter's own, about its libraries
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            classifier,
            (example,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the exporter gives the program it made"
    model = program.model_proto
    metadata = checkpoint.metadata
    onnx.helper.set_model_props(
        model,
        {"name": metadata.name, "version": checkpoint.version, "class_names": json.dumps(metadata.class_names)},
    )
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    difference = onnx_difference(data, classifier, checkpoint)
    with replacing(path) as file:
        file.write(data)
    logger.info("%s: as torch to %.1e in ONNX Runtime", path, difference)
    return difference


def onnx_difference(data: bytes, classifier: Classifier, checkpoint: Checkpoint) -> float:
    """Return the largest difference of a probability between the ONNX model ``data`` and ``classifier``.

    Compared over random images in several batch sizes and over the checkpoint's known images. Raises ExportError when it is
    above 1e-4, or when a typicality differs by more than 1e-2 and more than the share of one held-out image: it counts those
    images, so the last bit of a number that is equal to one of theirs decides whether that one counts.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    size = checkpoint.metadata.input.size
    rng = np.random.default_rng(0)
    batches: list[NDArray[np.uint8]] = [rng.integers(0, 256, (count, 3, size, size), np.uint8) for count in _BATCHES]
    if checkpoint.canary is not None:
        batches.append(checkpoint.canary.images)
    furthest, furthest_typicality = 0.0, 0.0
    classes = len(checkpoint.metadata.class_names)
    for images in batches:
        (answer,) = session.run(["probabilities"], {"images": images})
        with torch.inference_mode():
            expected = classifier(torch.from_numpy(images)).numpy()
        if answer.shape != expected.shape:
            raise ExportError(f"ONNX Runtime gives {answer.shape} for {expected.shape}; nothing was written")
        differences = np.abs(answer - expected)
        furthest = max(furthest, float(differences[:, :classes].max()))
        furthest_typicality = max(furthest_typicality, float(differences[:, classes:].max(initial=0.0)))
    if not furthest_typicality <= typicality_tolerance(checkpoint):
        raise ExportError(f"ONNX Runtime is off by {furthest_typicality:.2e} in the typicality; nothing was written")
    if not furthest <= _TOLERANCE:
        raise ExportError(f"ONNX Runtime is off by {furthest:.2e}, more than {_TOLERANCE:.0e}; nothing was written")
    return furthest


def typicality_tolerance(checkpoint: Checkpoint) -> float:
    """Return by how much the typicality of two runtimes may differ: 0.01, or the share of one held-out image.

    Held-out images that are equally strange to four digits count together or not at all.
    """
    if checkpoint.typicality is None:
        return 0.0
    strangeness = checkpoint.typicality.strangeness.astype(np.float64)
    _, repeats = np.unique(strangeness.round(4), return_counts=True)
    return max(_TYPICALITY_TOLERANCE, float(repeats.max()) / len(strangeness) + 1e-6)  # a float32's last bit
