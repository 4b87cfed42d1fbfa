"""A checkpoint in other forms is the same model."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from numpy.typing import NDArray

from service.model.architectures import MODELS
from service.model.checkpoint import Checkpoint, load_checkpoint
from service.model.classifier import Classifier
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from tests.support.tiny_network import eager, tiny_checkpoint, tiny_images
from tests.training.image_folders import CLASS_NAMES
from training.__main__ import main
from training.errors import ExportError
from training.output.export import export_onnx, onnx_difference, typicality_tolerance
from training.output.hub import write_hub_folder
from training.output.model_card import model_card


@pytest.fixture(scope="module")
def trained(finished_run: Path) -> Checkpoint:
    """The checkpoint of the tiny recipe."""
    return load_checkpoint(finished_run / "model.safetensors")


@pytest.fixture(scope="module")
def onnx_path(trained: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint as ONNX."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(trained, path)
    return path


def test_onnx_runtime_gives_what_the_service_gives(
    onnx_path: Path, trained: Checkpoint, sample_images: NDArray[np.uint8]
) -> None:
    """The same uint8 images give the same calibrated probabilities, in any batch size, from one file."""
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    runner = open_runner(trained, RunnerOptions(runtime="openvino", device="cpu", precision="fp32"))
    expected = runner.run(sample_images)
    runner.close()
    for count in (1, 3, 40):
        (answers,) = session.run(["probabilities"], {"images": sample_images[:count]})
        assert answers.dtype == np.float32
        classes = len(trained.metadata.class_names)
        np.testing.assert_allclose(answers[:, :classes], expected[:count, :classes], atol=1e-4)
        np.testing.assert_allclose(answers[:, classes:], expected[:count, classes:], atol=typicality_tolerance(trained))
    assert [path.name for path in onnx_path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("architecture", sorted(MODELS.keys() - {"resnet18"}))
def test_every_other_architecture_is_exported_too(architecture: str, tmp_path: Path) -> None:
    """Whatever layers it has (max pooling, norms in shortcuts), they give in ONNX Runtime what they give in torch."""
    checkpoint = tiny_checkpoint(architecture=architecture, size=64)
    export_onnx(checkpoint, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    images = tiny_images(64, 3)
    np.testing.assert_allclose(session.run(["probabilities"], {"images": images})[0], eager(checkpoint, images), atol=1e-4)


def test_the_onnx_file_says_what_it_is(onnx_path: Path, trained: Checkpoint) -> None:
    """Class names and version travel with the file."""
    model = onnx.load(onnx_path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["class_names"]) == list(trained.metadata.class_names)
    assert properties["version"] == trained.version


def test_a_file_that_answers_otherwise_does_not_pass(onnx_path: Path, trained: Checkpoint) -> None:
    """The parity check compares with the checkpoint's own network: the file of another network fails it."""
    bias = trained.weights["head.bias"]
    other = replace(trained, weights={**trained.weights, "head.bias": bias + np.arange(3, dtype=bias.dtype)})
    data = onnx_path.read_bytes()
    assert onnx_difference(data, Classifier(trained, torch.float32), trained) < 1e-4
    with pytest.raises(ExportError, match="off by"):
        onnx_difference(data, Classifier(other, torch.float32), other)


def test_one_of_few_held_out_images_may_count_or_not(trained: Checkpoint) -> None:
    """A model of few photographs is exported too, whatever the last bit of its strangeness is."""
    assert trained.metadata.metrics["val_images"] == 12
    assert typicality_tolerance(trained) == pytest.approx(1 / 13, abs=2e-6)


def test_the_exporters_chatter_is_not_shown(onnx_path: Path) -> None:
    """The libraries' loggers are at warning, so that a user sees one line about the parity."""
    assert onnx_path.exists()
    assert not logging.getLogger("onnxscript").isEnabledFor(logging.INFO)


def test_a_hub_folder_holds_the_same_checkpoint_and_its_card(finished_run: Path, tmp_path: Path) -> None:
    """The weights file is the one that is served, bit for bit; config and front matter are what the Hub reads."""
    source = finished_run / "model.safetensors"
    checkpoint = load_checkpoint(source)
    write_hub_folder(checkpoint, source, tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load_checkpoint(tmp_path / "hub" / "model.safetensors").version == checkpoint.version
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(3)] == list(CLASS_NAMES)
    assert config["label2id"] == {name: index for index, name in enumerate(CLASS_NAMES)}
    text = (tmp_path / "hub" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pipeline_tag"] == "image-classification"
    (result,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]  # type: ignore[no-untyped-call]  # the library's own
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == (
        "accuracy",
        pytest.approx(checkpoint.metadata.metrics["test_accuracy"], abs=1e-6),
    )
    assert text.endswith(model_card(checkpoint))


def test_the_card_states_what_was_measured(finished_run: Path) -> None:
    """Accuracy, per class, calibration, how it was trained and what it is not fit for are in the card, from the checkpoint."""
    checkpoint = load_checkpoint(finished_run / "model.safetensors")
    metrics = checkpoint.metadata.metrics
    card = (finished_run / "MODEL_CARD.md").read_text()
    assert card == model_card(checkpoint)
    for key in ("test_accuracy", "test_accuracy_tta", "test_accuracy_int8", "test_ece_before", "test_ece"):
        assert f"| {metrics[key] * 100:.2f} % |" in card
    for name, value in metrics["test_per_class"].items():
        assert f"| {name} | {value * 100:.2f} % |" in card
    assert checkpoint.version in card
    assert "Recipe `tiny`, seed 0, 6 of 6 epochs" in card
    assert f"- `augmentation`: `{json.dumps(checkpoint.metadata.recipe['augmentation'])}`" in card
    assert "## Not fit for" in card


def test_the_card_leaves_out_what_was_not_measured(checkpoint: Checkpoint) -> None:
    """Without figures and recipe in the checkpoint, the card has no such sections, and no invented number."""
    bare = replace(checkpoint, metadata=checkpoint.metadata.model_copy(update={"metrics": {}, "recipe": {}}))
    card = model_card(bare)
    assert "## Figures" not in card
    assert "## Training" not in card
    assert "11,154,890 parameters" in card
    assert "CIFAR-10" in card


def test_a_part_of_cifar10_is_a_folder_of_images(checkpoint: Checkpoint) -> None:
    """A figure on a hundred images of the same classes is not one on CIFAR-10's test set."""
    metrics = {**checkpoint.metadata.metrics, "test_images": 100}
    card = model_card(replace(checkpoint, metadata=checkpoint.metadata.model_copy(update={"metrics": metrics, "recipe": {}})))
    assert "trained on a folder of images" in card
    assert "On the 100 images of the test set" in card


def test_the_command_writes_both_and_asks_for_one(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``export`` writes what it is given a place for, and says so when that is nothing."""
    path = str(finished_run / "model.safetensors")
    assert main(["export", path]) == 2
    assert "nothing to export; give --onnx FILE, --hub-dir DIR, or both" in capsys.readouterr().err
    assert main(["export", path, "--onnx", str(tmp_path / "m.onnx"), "--hub-dir", str(tmp_path / "hub")]) == 0
    assert (tmp_path / "m.onnx").stat().st_size > 10_000
    assert (tmp_path / "hub" / "README.md").exists()
