"""The checkpoint file: what is saved is what is loaded, and whatever does not fit is refused in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from service.model.architectures import ModelConfig, layers_for
from service.model.atomic_file import WriteError
from service.model.checkpoint import (
    Calibration,
    Canary,
    CheckpointError,
    CheckpointMetadata,
    check_shapes,
    load_checkpoint,
    save_checkpoint,
    version_of,
)
from service.model.images import InputSpec
from service.model.layers import weight_shapes
from service.model.typicality import Typicality

Weights = dict[str, NDArray[Any]]
TINY = ModelConfig(num_classes=2, stem_width=8, widths=(8,), depths=(1,))


def tiny_weights() -> Weights:
    """Weights of a small network, some of which float16 cannot hold exactly."""
    rng = np.random.default_rng(0)
    shapes = weight_shapes(layers_for("resnet18", TINY))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tiny_metadata(**values: Any) -> CheckpointMetadata:
    given: dict[str, Any] = {
        "name": "tiny",
        "architecture": "resnet18",
        "config": TINY,
        "class_names": ("cat", "dog"),
        "input": InputSpec(size=16, fit="squash"),
        "calibration": Calibration(temperature=1.25, cubic=0.05, activation_max={"stem.2": 3.5}),
        "recipe": {"name": "baseline", "epochs": 10, "seed": 3},
        "metrics": {"test_accuracy": 0.875},
        "code_revision": "0123abc",
    }
    return CheckpointMetadata(**(given | values))


def tiny_canary() -> Canary:
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 16, 16), np.uint8)
    return Canary(images, np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], np.float32))


def write_file(path: Path, tensors: Weights, header: dict[str, str] | None) -> Path:
    """A safetensors file of anybody's making."""
    path.write_bytes(safetensors.numpy.save(tensors, metadata=header))
    return path


def write_metadata(path: Path, **changes: Any) -> Path:
    """A checkpoint whose metadata were changed behind the back of the class; None removes a field."""
    values = json.loads(tiny_metadata().model_dump_json()) | changes
    values = {name: value for name, value in values.items() if value is not None}
    return write_file(path, tiny_weights(), {"checkpoint": json.dumps(values)})


@contextmanager
def files_limited_to(count_bytes: int) -> Iterator[None]:
    """Let the system refuse writes beyond ``count_bytes`` of a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Round trip


def test_everything_saved_comes_back(tmp_path: Path) -> None:
    """Weights in full precision, every field of the metadata and the canary survive a round trip exactly."""
    weights, metadata, canary = tiny_weights(), tiny_metadata(), tiny_canary()
    save_checkpoint(tmp_path / "a.safetensors", weights, metadata, canary=canary, half=False)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded.weights[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.weights[name], value)
    assert loaded.metadata == metadata
    assert isinstance(loaded.metadata.input.mean, tuple)
    assert loaded.canary is not None
    np.testing.assert_array_equal(loaded.canary.images, canary.images)
    np.testing.assert_array_equal(loaded.canary.probabilities, canary.probabilities)
    assert loaded.canary.images.dtype == np.uint8


def test_half_precision_stores_weights_in_two_bytes(tmp_path: Path) -> None:
    """By default each weight is the float16 nearest to it; the canary's answers stay float32."""
    weights = tiny_weights()
    save_checkpoint(tmp_path / "half.safetensors", weights, tiny_metadata(), canary=tiny_canary())
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    for name in weights:
        assert loaded.weights[name].dtype == np.float16
        np.testing.assert_array_equal(loaded.weights[name], weights[name].astype(np.float16))
    assert loaded.canary is not None
    assert loaded.canary.probabilities.dtype == np.float32


def test_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    """Strided and transposed arrays, as slices and permutes give them, are stored by value and not by their buffer."""
    base = np.arange(96, dtype=np.float32).reshape(6, 16)
    canary = tiny_canary()
    every_other = Canary(canary.images[::2, ::-1], canary.probabilities[::2])
    weights = tiny_weights() | {"head.weight": base.T[::2, :2].T[..., None, None], "stem.0.bias": base[3, ::2]}
    save_checkpoint(tmp_path / "views.safetensors", weights, tiny_metadata(), canary=every_other)
    loaded = load_checkpoint(tmp_path / "views.safetensors")
    np.testing.assert_array_equal(loaded.weights["head.weight"], weights["head.weight"])
    np.testing.assert_array_equal(loaded.weights["stem.0.bias"], base[3, ::2])
    assert loaded.canary is not None
    np.testing.assert_array_equal(loaded.canary.images, canary.images[::2, ::-1])
    np.testing.assert_array_equal(loaded.canary.probabilities, canary.probabilities[::2])


def test_a_checkpoint_without_a_canary_has_none(tmp_path: Path) -> None:
    """The canary is optional, and its tensors never appear among the weights."""
    save_checkpoint(tmp_path / "a.safetensors", tiny_weights(), tiny_metadata())
    assert load_checkpoint(tmp_path / "a.safetensors").canary is None
    save_checkpoint(tmp_path / "b.safetensors", tiny_weights(), tiny_metadata(), canary=tiny_canary())
    assert load_checkpoint(tmp_path / "b.safetensors").weights.keys() == tiny_weights().keys()


def test_other_tools_can_read_the_file(tmp_path: Path) -> None:
    """It is plain safetensors, so torch's loader and any other takes it."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, tiny_weights(), tiny_metadata(), half=False)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tiny_weights().keys()
    for name, value in tiny_weights().items():
        np.testing.assert_array_equal(loaded[name].numpy(), value)


def test_the_creation_date_is_a_utc_timestamp() -> None:
    """Unless one is given, metadata carry the moment they were made, with its zone."""
    created = datetime.fromisoformat(tiny_metadata().created)
    assert created.utcoffset() is not None
    assert tiny_metadata(created="2024-01-01T00:00:00+00:00").created == "2024-01-01T00:00:00+00:00"


# Version


def test_the_version_is_the_file_s_sha_256(tmp_path: Path) -> None:
    """It is the first 12 hex digits; saving returns it, and loading computes the same."""
    path = tmp_path / "a.safetensors"
    version = save_checkpoint(path, tiny_weights(), tiny_metadata())
    assert version == load_checkpoint(path).version == hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_the_same_content_has_the_same_version(tmp_path: Path) -> None:
    """Bytes depend on what is saved and on nothing else; any change of weights or metadata is another version."""
    metadata = tiny_metadata(created="2024-01-01T00:00:00+00:00")
    first = save_checkpoint(tmp_path / "a.safetensors", tiny_weights(), metadata)
    for _ in range(8):
        assert save_checkpoint(tmp_path / "b.safetensors", dict(reversed(tiny_weights().items())), metadata) == first
    changed = tiny_weights()
    changed["stem.0.bias"][0] += 1
    assert save_checkpoint(tmp_path / "c.safetensors", changed, metadata) != first
    hotter = metadata.model_copy(update={"calibration": Calibration(temperature=2.0)})
    assert save_checkpoint(tmp_path / "d.safetensors", tiny_weights(), hotter) != first


# Atomic write


def test_saving_replaces_the_old_file_whole(tmp_path: Path) -> None:
    """A second save to one path leaves one file: the new one, readable by every user."""
    path = tmp_path / "deep" / "folder" / "a.safetensors"
    save_checkpoint(path, tiny_weights(), tiny_metadata(name="old"))
    save_checkpoint(path, tiny_weights(), tiny_metadata(name="new"))
    assert load_checkpoint(path).metadata.name == "new"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_reader_of_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    """Saving never writes into a file that somebody has open, so nobody reads half of each."""
    path = tmp_path / "a.safetensors"
    version = save_checkpoint(path, tiny_weights(), tiny_metadata(name="old"))
    with path.open("rb", buffering=0) as file:
        start = file.read(100)
        save_checkpoint(path, {name: -value for name, value in tiny_weights().items()}, tiny_metadata(name="new"))
        assert version_of(start + file.read()) == version


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """When the disk is full in the middle, the old checkpoint is untouched and no half-written file stays behind."""
    path = tmp_path / "a.safetensors"
    version = save_checkpoint(path, tiny_weights(), tiny_metadata(name="old"))
    large = {"weight": np.zeros(100_000, np.float32)}
    with files_limited_to(10_000), pytest.raises(WriteError, match="cannot write") as caught:
        save_checkpoint(path, large, tiny_metadata(name="new"))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load_checkpoint(path).version == version


@pytest.mark.parametrize("target", ["a-file/model.safetensors", "a-folder"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, target: str) -> None:
    """A parent that is a file, or a target that is a folder, is refused in words, and nothing is left."""
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder").mkdir()
    with pytest.raises(WriteError, match=f"cannot write .*{target}"):
        save_checkpoint(tmp_path / target, tiny_weights(), tiny_metadata())
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a-file", "a-folder"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    """A diverged network, or one that half precision cannot hold, never becomes a checkpoint."""
    weights = tiny_weights()
    weights["stem.0.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"weight stem\.0\.bias is not finite in float16"):
        save_checkpoint(tmp_path / "a.safetensors", weights, tiny_metadata())
    assert not list(tmp_path.iterdir())


# Files that cannot be loaded


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    """The first thing a new user may meet names the path and the command."""
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.safetensors; make train writes one"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_what_is_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    """Nor is a pipe, which may never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="is not a file"):
            load_checkpoint(path)


class Bomb:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickled_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    """Neither a bare pickle nor a file of torch.save is ever opened, whatever it is called."""
    trace = tmp_path / "executed"
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    torch.save(Bomb(trace), tmp_path / "torch.safetensors")
    for name in ("pickle", "torch"):
        with pytest.raises(
            CheckpointError, match="not a safetensors file, or is damaged; pickled checkpoints are never loaded"
        ):
            load_checkpoint(tmp_path / f"{name}.safetensors")
    assert not trace.exists()
    pickle.loads((tmp_path / "pickle.safetensors").read_bytes())
    assert trace.exists(), "the bomb works, so its silence above meant something"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    """A copy that broke off is noticed, wherever it broke off."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, tiny_weights(), tiny_metadata())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="not a safetensors file, or is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("data", [b"\xff" * 200, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{", b"\0" * 64, b"hello"])
def test_noise_is_refused(tmp_path: Path, data: bytes) -> None:
    """Bytes that are not safetensors at all give the same clear error."""
    path = tmp_path / "noise.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_weights_without_metadata_are_refused(tmp_path: Path) -> None:
    """A safetensors file of another program has no class names or input spec, and is not guessed at."""
    for header in (None, {"format": "pt"}):
        with pytest.raises(CheckpointError, match="has weights but no checkpoint metadata"):
            load_checkpoint(write_file(tmp_path / "a.safetensors", tiny_weights(), header))


# Metadata that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "does not fit format version 2: format_version: Input should be 1 or 2"),
        ({"name": ""}, "name: String should have at least 1 character"),
        ({"name": "../../etc"}, "name: String should match pattern"),
        ({"architecture": None}, "architecture: Field required"),
        ({"config": None}, "config: Field required"),
        ({"class_names": ["cat"]}, "class_names: Tuple should have at least 2 items"),
        ({"class_names": ["cat", "cat"]}, "class_names repeats a name"),
        ({"class_names": ["cat", "dog", "cow"]}, "config has num_classes 2 and there are 3 class names"),
        ({"config": {}}, "config has num_classes 10 and there are 2 class names"),
        ({"config": {"num_classes": 2, "in_channels": 1}}, "config.in_channels: Input should be 3"),
        ({"config": {"num_classes": 2, "colour": "blue"}}, "config.colour: Unexpected keyword argument"),
        ({"config": {"num_classes": 2, "widths": [4, 8], "depths": [1]}}, "config: Value error, widths (4, 8) and depths (1,)"),
        ({"config": {"num_classes": 2, "widths": "wide"}}, "config.widths: Input should be a valid array"),
        ({"config": {"num_classes": 2, "widths": [4, 8.5]}}, "config.widths.1: Input should be a valid integer"),
        ({"architecture": "vit"}, "unknown architecture 'vit'; known: resnet18, resnet18-imagenet"),
        ({"input": {"size": 0}}, "input: Value error, an input spec needs a size of at least 1"),
        ({"input": {"size": "large"}}, "input.size: Input should be a valid integer"),
        ({"input": {"std": [1, 0, 1]}}, "three standard deviations above 0"),
        ({"input": {"fit": "stretch"}}, "input.fit: Input should be 'crop' or 'squash'"),
        ({"calibration": {"temperature": 0}}, "calibration.temperature: Input should be greater than 0"),
        ({"calibration": {"cubic": -0.1}}, "calibration.cubic: Input should be greater than or equal to 0"),
        ({"calibration": {"cubic": None}}, "calibration.cubic: Input should be a valid number"),
        ({"calibration": {"activation_max": {"stem.2": -1}}}, "calibration.activation_max.stem.2: Input should be greater"),
        ({"calibration": {"cooling": 1}}, "calibration.cooling: Extra inputs are not permitted"),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Each field that is missing, unknown or impossible is named with the reason."""
    path = write_metadata(tmp_path / "a.safetensors", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_metadata_that_are_no_json_are_refused(tmp_path: Path) -> None:
    """A damaged header entry is an error of the checkpoint, not of a JSON parser."""
    for text in ("", "{", "[]", "null"):
        with pytest.raises(CheckpointError, match="does not fit format version 2"):
            load_checkpoint(write_file(tmp_path / "a.safetensors", tiny_weights(), {"checkpoint": text}))


def test_fields_that_older_files_lack_have_defaults(tmp_path: Path) -> None:
    """Calibration, recipe and metrics are optional, and mean: none."""
    loaded = load_checkpoint(write_metadata(tmp_path / "a.safetensors", calibration=None, recipe=None, metrics=None))
    assert loaded.metadata.calibration == Calibration(temperature=1.0, activation_max={})
    assert loaded.metadata.recipe == loaded.metadata.metrics == {}
    loaded = load_checkpoint(write_metadata(tmp_path / "a.safetensors", calibration={"temperature": 0.75}))
    assert loaded.metadata.calibration == Calibration(temperature=0.75, cubic=0.0)


def test_metadata_are_frozen() -> None:
    """What was loaded cannot be changed by whoever reads it."""
    with pytest.raises(ValidationError, match="frozen"):
        tiny_metadata().name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        Calibration().temperature = 2.0


# Known images and typicality


def tiny_typicality() -> Typicality:
    arrays = np.zeros(8), np.eye(3, 8), np.zeros((2, 8)), np.zeros(2), np.arange(3)
    return Typicality(*(array.astype(np.float32) for array in arrays))


def test_typicality_comes_back(tmp_path: Path) -> None:
    """Its arrays stay float32 and are not among the weights."""
    fitted = tiny_typicality()
    save_checkpoint(tmp_path / "a.safetensors", tiny_weights(), tiny_metadata(), typicality=fitted)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert loaded.weights.keys() == tiny_weights().keys()
    assert loaded.typicality is not None
    for name, value in vars(fitted).items():
        np.testing.assert_array_equal(getattr(loaded.typicality, name), value, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"canary.images": np.zeros((3, 3, 32, 32), np.uint8)},
            r"input size and classes .*expected \(3, 3, 16, 16\)",
        ),
        ({"canary.probabilities": np.zeros((3, 5), np.float32)}, r"probabilities is \(3, 5\), expected \(3, 2\)"),
        ({"canary.probabilities": np.zeros((2, 2), np.float32)}, "probabilities is"),
        ({"canary.images": np.zeros((0, 3, 16, 16), np.uint8)}, "images is"),
        ({"canary.images": np.zeros((), np.uint8)}, "images is"),
        ({"canary.images": np.zeros((3, 3, 16, 16), np.float32)}, "images must be finite uint8"),
        ({"canary.probabilities": np.zeros((3, 2), np.float16)}, "probabilities must be finite float32"),
        ({"canary.probabilities": None}, "no canary.probabilities"),
        ({"canary.images": None}, "no canary.images"),
        ({"typicality.bias": None}, "no typicality.bias"),
        ({"typicality.weights": np.zeros((3, 8), np.float32)}, r"weights is \(3, 8\), expected \(2, 8\)"),
        ({"typicality.directions": np.zeros((), np.float32)}, "directions is"),
        ({"typicality.directions": np.zeros((3, 3), np.float32)}, "directions is"),
        ({"typicality.strangeness": np.zeros(0, np.float32)}, "strangeness is"),
        ({"typicality.strangeness": np.full(3, np.nan, np.float32)}, "strangeness must be finite float32"),
        ({"typicality.directions": np.eye(3, 8)}, "directions must be finite float32"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, NDArray[Any] | None], message: str) -> None:
    """A missing array, another shape, other numbers: each is said, since it could not vouch for a model."""
    parts = {"canary": tiny_canary(), "typicality": tiny_typicality()}
    arrays = {f"{part}.{name}": array for part, values in parts.items() for name, array in vars(values).items()}
    present = {name: value for name, value in (arrays | changes).items() if value is not None}
    header = {"checkpoint": tiny_metadata().model_dump_json()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write_file(tmp_path / "a.safetensors", tiny_weights() | present, header))


# Weights that do not fit


def test_weights_that_fit_are_let_through() -> None:
    """The same names with the same shapes are no problem, in any order and of any float type."""
    weights = tiny_weights()
    check_shapes(weights, {name: value.shape for name, value in reversed(weights.items())})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("stem.0.bias"), "missing stem.0.bias"),
        (lambda weights: weights.update(extra=np.zeros(1, np.float32)), "unexpected extra"),
        (lambda weights: weights.update({"stem.0.bias": np.zeros(9, np.float32)}), "stem.0.bias is (9,), expected (8,)"),
    ],
)
def test_every_weight_that_does_not_fit_is_named(change: Any, message: str) -> None:
    """Missing, unexpected and misshapen weights are told apart."""
    weights = tiny_weights()
    change(weights)
    with pytest.raises(CheckpointError, match="does not fit the architecture") as caught:
        check_shapes(weights, {name: value.shape for name, value in tiny_weights().items()})
    assert message in str(caught.value)


def test_many_problems_are_counted_instead_of_listed() -> None:
    """A checkpoint of a wholly different network gives a line, not a page."""
    with pytest.raises(CheckpointError, match=r"missing layer0; .*missing layer4; and 35 more"):
        check_shapes({}, {f"layer{index}": (1,) for index in range(40)})


# The checkpoint in hand


def test_a_resnet_18_takes_23_megabytes(checkpoint_path: Path) -> None:
    """In half precision the whole model is about two bytes for each of its 11 million parameters, and 0.2 MB of typicality."""
    assert 22_000_000 < checkpoint_path.stat().st_size < 23_000_000
    checkpoint = load_checkpoint(checkpoint_path)
    assert all(value.dtype == np.float16 for value in checkpoint.weights.values())
    assert len(checkpoint.metadata.class_names) == 10
    assert checkpoint.metadata.calibration.activation_max
