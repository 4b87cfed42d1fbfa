"""From somebody's own folder of images to a service that answers with its classes."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.servers.service_process import ServiceProcess
from service.client import Client
from service.model.checkpoint import load_checkpoint
from service.model.classifier import calibrated
from service.model.images import InputSpec, decode_image
from service.model.network import model_from_checkpoint
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from tests.training.image_folders import CLASS_NAMES, draw_image, write_classes
from tests.training.tiny_run import TINY
from training.__main__ import main
from training.data.dataset import Source
from training.evaluation.calibrate import predict_logits
from training.recipes import RECIPES
from training.run.run_folder import read_log


@pytest.fixture
def tiny_recipe(monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny recipe, registered as a user would register one."""
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    return "tiny"


def jpeg(label: str, seed: int) -> bytes:
    """A new image of a class, as a user would send it."""
    file = BytesIO()
    Image.fromarray(draw_image(label, np.random.default_rng(seed))).save(file, "JPEG")
    return file.getvalue()


def test_a_run_leaves_everything_people_look_at(finished_run: Path) -> None:
    """The run's folder holds the checkpoint, its card, the pictures, the log, the recipe, and TensorBoard's scalars."""
    assert {path.name for path in finished_run.iterdir()} == {
        "MODEL_CARD.md", "confusion.csv", "confusion.png", "curves.png", "log.csv", "mistakes.csv", "mistakes.png",
        "model.safetensors", "recipe.json", "state.pt", "tensorboard",
    }  # fmt: skip
    for name in ("confusion.png", "curves.png", "mistakes.png"):
        with Image.open(finished_run / name) as image:
            image.load()
            assert min(image.size) > 300
    recipe = json.loads((finished_run / "recipe.json").read_text())
    assert (recipe["name"], recipe["seed"]) == ("tiny", 0)
    rows = read_log(finished_run)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(finished_run / "tensorboard")).Reload()
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(row["epoch"], pytest.approx(row[name], rel=1e-5)) for row in rows]


def test_a_checkpoint_holds_what_was_measured(finished_run: Path, source: Source) -> None:
    """The figures in the checkpoint are those of its own weights on the test set, and its loss has fallen."""
    checkpoint = load_checkpoint(finished_run / "model.safetensors")
    metadata = checkpoint.metadata
    logits = predict_logits(model_from_checkpoint(checkpoint), source.test.images, metadata.input)
    assert metadata.metrics["test_accuracy"] == pytest.approx((logits.argmax(1) == source.test.labels).double().mean().item())
    assert metadata.metrics["test_images"] == 30
    assert metadata.metrics["epochs_done"] == 6
    assert set(metadata.metrics["test_per_class"]) == set(CLASS_NAMES)
    assert metadata.calibration.activation_max.keys() >= {"stem.2", "stages.3.0.relu2"}
    rows = read_log(finished_run)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_the_canary_is_from_validation_and_says_what_the_network_says(finished_run: Path, source: Source) -> None:
    """Known images are neither trained on nor tested with; their answers are the stored weights' own, in float32."""
    checkpoint = load_checkpoint(finished_run / "model.safetensors")
    canary, recipe = checkpoint.canary, checkpoint.metadata.recipe
    assert canary is not None, "the tiny network is sure of some of its easy images"
    assert 1 <= len(canary.images) <= 8
    kept, validation = source.train.split(recipe["validation_images"], recipe["seed"])
    places = [[torch.equal(image, torch.from_numpy(known)) for image in validation.images] for known in canary.images]
    assert [sum(place) for place in places] == [1] * len(canary.images)
    for known in canary.images:
        assert not any(torch.equal(image, torch.from_numpy(known)) for image in (*kept.images, *source.test.images))
    logits = predict_logits(model_from_checkpoint(checkpoint), torch.from_numpy(canary.images), checkpoint.metadata.input)
    expected = calibrated(logits, checkpoint.metadata.calibration).softmax(1).numpy()
    np.testing.assert_allclose(canary.probabilities, expected, atol=1e-5)


def test_own_images_are_trained_on_and_served(tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single folder of JPEGs in other sizes gives a checkpoint that a runner serves, in every precision, with its labels."""
    data = write_classes(tmp_path / "my-images", 40)
    out = tmp_path / "run"
    assert (
        main(["train", "--recipe", tiny_recipe, "--data", str(data), "--out", str(out), "--device", "cpu", "--name", "my bees"])
        == 0
    )
    path = Path(capsys.readouterr().out.strip())
    assert path == out / "model.safetensors"
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata.class_names == CLASS_NAMES
    assert checkpoint.metadata.name == "my-bees"
    images = np.stack([decode_image(jpeg(label, seed=100), checkpoint.metadata.input) for label in CLASS_NAMES])
    for precision in ("fp32", "int8"):
        runner = open_runner(checkpoint, RunnerOptions(runtime="openvino", device="cpu", precision=precision))
        assert [CLASS_NAMES[index] for index in runner.run(images)[:, :-1].argmax(1)] == list(CLASS_NAMES)
        runner.close()


def test_another_input_size_is_served_at_that_size(tiny_recipe: str, data_folder: Path, tmp_path: Path) -> None:
    """A network trained at 48 pixels says so in its checkpoint, and is fed 48 pixels."""
    arguments = ["--data", str(data_folder), "--out", str(tmp_path), "--device", "cpu", "--size", "48"]
    assert main(["train", "--recipe", tiny_recipe, *arguments]) == 0
    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.metadata.input == InputSpec(size=48)
    runner = open_runner(checkpoint, RunnerOptions(device="cpu"))
    image = decode_image(jpeg("red", seed=100), checkpoint.metadata.input)
    assert CLASS_NAMES[runner.run(image[None]).argmax()] == "red"
    runner.close()


def test_a_checkpoint_can_be_measured_again(data_folder: Path, finished_run: Path, tmp_path: Path) -> None:
    """``calibrate`` finds the same held-out images, and gives the checkpoint the same calibration, figures and canary."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((finished_run / "model.safetensors").read_bytes())
    before = load_checkpoint(path)
    note = "drawn for a test"
    assert main(["calibrate", str(path), "--data", str(data_folder), "--data-note", note]) == 0
    after = load_checkpoint(path)
    assert after.metadata.calibration.temperature == pytest.approx(before.metadata.calibration.temperature, rel=1e-3)
    assert after.metadata.calibration.cubic == pytest.approx(before.metadata.calibration.cubic, rel=1e-2)
    assert after.metadata.metrics["test_accuracy"] == before.metadata.metrics["test_accuracy"]
    assert after.canary is not None
    assert before.canary is not None
    np.testing.assert_array_equal(after.canary.images, before.canary.images)
    assert note in (tmp_path / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_three_classes_of_ones_own_are_known_and_photographs_are_not(tmp_path: Path, image_paths: list[Path]) -> None:
    """One command, which chooses recipe and first weights itself, ends in a service that tells them apart."""
    data, out = write_classes(tmp_path / "my-images", 60), tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "training",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--epochs=8",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with ServiceProcess(out / "model.safetensors") as service, Client(service.url, timeout_s=30) as client:
        assert client.labels().labels == list(CLASS_NAMES)
        offered = httpx.get(f"{service.url}/samples").json()["samples"]
        assert {sample["label"] for sample in offered} == set(CLASS_NAMES)
        own = [client.predict(jpeg(label, seed)) for seed in range(100, 110) for label in CLASS_NAMES]
        assert [answer.label for answer in own] == [*CLASS_NAMES] * 10
        assert sum(answer.known is True for answer in own) >= 0.8 * len(own)
        photographs = [client.predict(path.read_bytes()) for path in image_paths]
        assert sum(answer.known is False for answer in photographs) >= 0.8 * len(photographs)
