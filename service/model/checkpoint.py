"""One checkpoint file: safetensors weights and the metadata that rebuilds everything around them.

Weights are numpy arrays, so a process that needs no torch loads none. The file is a plain safetensors file; its header holds
one metadata entry, ``checkpoint``, the JSON of ``CheckpointMetadata``. Nothing in it is executed when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from service.model.architectures import ModelConfig, layers_for
from service.model.atomic_file import read_whole, replacing
from service.model.images import InputSpec
from service.model.layers import Layers, Linear, weight_shapes
from service.model.typicality import DEFAULT_THRESHOLD, Typicality

FORMAT_VERSION: Literal[2] = 2  # 1 has no typicality and no threshold
_METADATA_KEY = "checkpoint"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says why and what to do."""


class Calibration(BaseModel):
    """What the trained network was measured for: scores that mean what they say, and its int8 form.

    Scores are ``softmax(curve(z - max(z)))`` of an image's logits z, where ``curve(x) = x / temperature + cubic * x**3``.
    Without the cubic term this is temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017). With
    it, distances to the best class grow the more the larger they are: label smoothing taught the network to hold every one of
    them near log(K/smoothing), so there a small step means much. The curve rises, so the order of the classes stays
    (Rahimi et al., "Intra Order-preserving Functions for Calibration of Multi-Class Neural Networks", 2020).

    ``activation_max`` holds the largest value that the int8 form represents at the output of each ReLU, by the name of
    its module in ``service.model.network`` (``stem.2``, ``stages.0.0.relu1``, ...); it is empty when the checkpoint was not
    calibrated for int8.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    cubic: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    activation_max: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}


class CheckpointMetadata(BaseModel):
    """Everything beside the weights.

    ``recipe`` and ``metrics`` are written by the training program and only shown by the service. An image whose typicality is
    below ``unknown_threshold`` is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2] = FORMAT_VERSION
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    architecture: str
    config: ModelConfig
    class_names: tuple[str, ...] = Field(min_length=2)
    input: InputSpec = InputSpec()
    calibration: Calibration = Calibration()
    unknown_threshold: float = Field(default=DEFAULT_THRESHOLD, ge=0, le=1)
    recipe: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    code_revision: str = "unknown"

    @model_validator(mode="after")
    def _config_agrees(self) -> CheckpointMetadata:
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names repeats a name")
        if self.config.num_classes != len(self.class_names):
            raise ValueError(
                f"config has num_classes {self.config.num_classes} and there are {len(self.class_names)} class names"
            )
        layers_for(self.architecture, self.config)
        return self


@dataclass(frozen=True)
class Canary:
    """Known images with their answers, which a runner must reproduce before it serves.

    ``images`` is uint8 (K, 3, size, size); ``probabilities`` is float32 (K, num_classes), from the network in float32.
    """

    images: NDArray[np.uint8]
    probabilities: NDArray[np.float32]

    def shapes(self, size: int, classes: int, _features: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array, for images of ``size`` pixels a side and that many ``classes``."""
        count = max(1, len(np.atleast_1d(self.images)))
        return {"canary.images": (count, 3, size, size), "canary.probabilities": (count, classes)}


Part = TypeVar("Part", Canary, Typicality)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: ``weights`` by parameter name (float32, or float16 as stored).

    ``version`` is that of the file, which every answer carries.
    """

    weights: Mapping[str, NDArray[Any]]
    metadata: CheckpointMetadata
    version: str
    canary: Canary | None = None
    typicality: Typicality | None = None

    def __post_init__(self) -> None:
        """Raise CheckpointError where an array does not fit the network, its input size or its classes."""
        layers, metadata = self.layers, self.metadata
        check_shapes(self.weights, weight_shapes(layers))
        head = layers[-1]
        assert isinstance(head, Linear), "a network ends in its head"
        for part in (self.canary, self.typicality):
            if part is not None:
                check_shapes(_arrays(part), part.shapes(metadata.input.size, len(metadata.class_names), head.in_features))
        for name, array in _arrays(self.canary, self.typicality).items():
            dtype = np.dtype(np.uint8 if name == "canary.images" else np.float32)
            if array.dtype != dtype or not np.isfinite(array).all():
                raise CheckpointError(f"{name} must be finite {dtype}; save the checkpoint again")

    @property
    def layers(self) -> Layers:
        """The network, to which the weights fit."""
        return layers_for(self.metadata.architecture, self.metadata.config)


def save_checkpoint(
    path: Path,
    weights: Mapping[str, NDArray[Any]],
    metadata: CheckpointMetadata,
    *,
    canary: Canary | None = None,
    typicality: Typicality | None = None,
    half: bool = True,
) -> str:
    """Write a checkpoint atomically and return its version: readers see the old file or the new one, whole.

    ``half`` stores float weights as float16 (about 22 MB for ResNet-18). Raises CheckpointError when a weight is not finite and
    WriteError when the disk is full or the folder cannot be written; nothing half-written is left.
    """
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite and is refused below
        tensors = {
            name: np.ascontiguousarray(value.astype(np.float16) if half and value.dtype == np.float32 else value)
            for name, value in weights.items()
        }
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(f"weight {name} is not finite in {value.dtype}; training diverged, so it is not saved")
    tensors |= {name: np.ascontiguousarray(array) for name, array in _arrays(canary, typicality).items()}
    metadata = metadata.model_copy(update={"format_version": FORMAT_VERSION})
    # One entry only: the library writes several in any order, and the same content shall have the same digest.
    data = save(tensors, metadata={_METADATA_KEY: metadata.model_dump_json()})
    with replacing(path) as file:
        file.write(data)
    return version_of(data)


def version_of(data: bytes) -> str:
    """Return the version of a checkpoint file: the first 12 hex digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def load_checkpoint(path: Path) -> Checkpoint:
    """Load and verify a checkpoint; raise CheckpointError for a missing, damaged or foreign file."""
    return read_checkpoint(checkpoint_bytes(path), path)


def checkpoint_bytes(path: Path) -> bytes:
    """Return what the file holds, unverified; raise CheckpointError where it cannot be read."""
    try:
        return read_whole(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint at {path}; make train writes one, and without SERVICE_CHECKPOINT the shipped one is served"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def read_checkpoint(data: bytes, path: Path) -> Checkpoint:
    """Verify the bytes of a checkpoint; raise CheckpointError about ``path`` where they are none."""
    try:
        weights = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the format: length, JSON header, tensors
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged; pickled checkpoints are never loaded"
        ) from error
    text = header.get("__metadata__", {}).get(_METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path} has weights but no checkpoint metadata; save it with 'python -m training train'")
    try:
        metadata = CheckpointMetadata.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'metadata'}: {item['msg']}" for item in error.errors(include_url=False)
        )
        raise CheckpointError(f"the metadata of {path} does not fit format version {FORMAT_VERSION}: {problems}") from error
    canary, typicality = _take(Canary, weights), _take(Typicality, weights)
    return Checkpoint(weights, metadata, version_of(data), canary, typicality)


def _arrays(*parts: Canary | Typicality | None) -> dict[str, NDArray[Any]]:
    """Return the arrays of the parts that there are, by the names under which a checkpoint stores them."""
    named = ((type(part).__name__.lower(), vars(part)) for part in parts if part is not None)
    return {f"{name}.{field}": array for name, arrays in named for field, array in arrays.items()}


def _take(kind: type[Part], weights: dict[str, NDArray[Any]]) -> Part | None:
    """Remove the arrays of a part from ``weights``; None where there are none. Raise CheckpointError where one is missing."""
    names = [f"{kind.__name__.lower()}.{field.name}" for field in fields(kind)]
    missing = [name for name in names if name not in weights]
    if missing and len(missing) < len(names):
        raise CheckpointError(f"the checkpoint has no {', '.join(missing)}; save it again")
    return None if missing else kind(*map(weights.pop, names))


def check_shapes(weights: Mapping[str, NDArray[Any]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError naming every weight that is missing, unexpected or of another shape than ``expected``."""
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != tuple(shape)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit the architecture, input size and classes that it names: {shown}")
