"""A network small enough to be made anew in every test, and what it has to answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.model.architectures import ModelConfig
from service.model.checkpoint import Calibration, Checkpoint, CheckpointMetadata
from service.model.images import InputSpec
from service.model.network import model_from_checkpoint
from training.evaluation.calibrate import activation_ranges
from training.step.network import build_model, weights_of


def tiny_checkpoint(*, architecture: str = "resnet18", size: int = 16, calibrated: bool = True, **config: Any) -> Checkpoint:
    """A small random network of three classes, as it would be after loading."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"num_classes": 3, "stem_width": 8, "widths": (16, 24), "depths": (1, 2)}
    shape = ModelConfig(**(values | config))
    model = build_model(architecture, shape)
    spec = InputSpec(size=size, mean=(0.3, 0.5, 0.7), std=(0.1, 0.2, 0.4))
    images = tiny_images(size, 64)
    model.train()(torch.from_numpy(images).float() / 64 - 2)
    maxima = activation_ranges(model.eval(), torch.from_numpy(images), spec) if calibrated else {}
    metadata = CheckpointMetadata(
        name="tiny",
        architecture=architecture,
        config=shape,
        class_names=tuple(f"class {index}" for index in range(shape.num_classes)),
        input=spec,
        calibration=Calibration(temperature=0.4, cubic=0.1, activation_max=maxima),
    )
    return Checkpoint(weights_of(model), metadata, "0" * 12)


def tiny_images(size: int = 16, count: int = 7) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def eager(checkpoint: Checkpoint, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The definition of a right answer: normalise, the network in float32, the curve of its calibration, softmax."""
    model = model_from_checkpoint(checkpoint)
    spec, calibration = checkpoint.metadata.input, checkpoint.metadata.calibration
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    with torch.inference_mode():
        logits = torch.cat([model(((torch.from_numpy(image) / 255 - mean) / std)[None]) for image in images])
        centred = logits - logits.max(1, keepdim=True).values
        curved = centred / calibration.temperature + calibration.cubic * centred**3
        probabilities: NDArray[np.float32] = torch.softmax(curved, 1).numpy()
    return probabilities


def change(checkpoint: Checkpoint, **values: Any) -> Checkpoint:
    """The checkpoint with other metadata."""
    return replace(checkpoint, metadata=checkpoint.metadata.model_copy(update=values))
