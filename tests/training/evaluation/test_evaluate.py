"""A checkpoint is measured the same way offline and through the service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint, load_checkpoint
from service.model.images import InputSpec
from service.runtime.open_runner import open_runner
from service.runtime.runner import Runner, RunnerOptions
from training.__main__ import main
from training.data.dataset import Dataset
from training.data.folder import load_folder
from training.errors import EvaluationError
from training.evaluation.evaluate import as_dict, as_table, evaluate, evaluate_runners
from training.evaluation.http_predictor import HttpPredictor
from training.evaluation.measurement import Predictions
from training.evaluation.predictor import RunnerPredictor, average

VIEWS = 8  # of each of the 40 sample images: 320 in all


@pytest.fixture(scope="module")
def many_images(image_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 images in class folders: the samples themselves, and shifted, noisy, larger JPEGs of them."""
    folder = tmp_path_factory.mktemp("many-images")
    rng = np.random.default_rng(0)
    for path in image_paths:
        name, number = path.stem.rsplit("-", 1)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{number}.png").write_bytes(path.read_bytes())
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.int16)
        for view in range(1, VIEWS):
            moved = np.roll(pixels, rng.integers(-3, 4, 2), (0, 1)) + rng.normal(0, 4 * view, pixels.shape)
            image = Image.fromarray(moved.clip(0, 255).astype(np.uint8))
            size = (int(rng.integers(24, 200)), int(rng.integers(24, 200)))
            image.resize(size, Image.Resampling.BICUBIC).save(folder / name / f"{number}-{view}.jpg", quality=60)
    return folder


@pytest.fixture(scope="module")
def data(many_images: Path, checkpoint: Checkpoint) -> Dataset:
    """The same images, loaded."""
    return load_folder(many_images, InputSpec(), class_names=checkpoint.metadata.class_names)


@pytest.fixture(scope="module")
def runner(checkpoint: Checkpoint) -> Iterator[Runner]:
    """What the service runs here when nobody says otherwise."""
    runner = open_runner(checkpoint)
    yield runner
    runner.close()


def test_the_service_and_the_runner_agree_to_the_image(
    data: Dataset, checkpoint: Checkpoint, runner: Runner, service: ServiceProcess
) -> None:
    """For hundreds of files in many sizes, class and ranking are the same, and scores to the digits that are sent.

    But for an image or two: what lies on the border of two int8 steps may round the other way in another batch.
    """
    offline = evaluate(checkpoint, data, RunnerPredictor(runner))
    online = evaluate(checkpoint, data, HttpPredictor(service.url, checkpoint))
    assert len(data) == 40 * VIEWS
    assert torch.equal(offline.predictions.labels, online.predictions.labels)
    furthest = (offline.predictions.probabilities - online.predictions.probabilities).abs().amax(1)
    assert furthest.max() < 2e-3
    assert (furthest <= 2e-6).float().mean() > 0.99
    assert (offline.plain.top1, offline.plain.top5) == (online.plain.top1, online.plain.top5)
    assert offline.plain.per_class == online.plain.per_class
    assert offline.plain.ece == pytest.approx(online.plain.ece, abs=1e-5)
    assert offline.plain.ece_before == pytest.approx(online.plain.ece_before, abs=1e-4)
    assert 0.2 < offline.plain.top1 < 1.0, "images that are all right or all wrong would show little"


def test_mirror_images_agree_too(data: Dataset, checkpoint: Checkpoint, runner: Runner, service: ServiceProcess) -> None:
    """Mirrored images have no file; they go as PNG, and come out as offline."""
    part = data.subset(torch.arange(0, len(data), 8))
    offline = RunnerPredictor(runner).predict(part.mirrored())
    online = HttpPredictor(service.url, checkpoint).predict(part.mirrored())
    assert torch.equal(offline.labels, online.labels)
    assert not torch.equal(offline.probabilities, RunnerPredictor(runner).predict(part).probabilities)


def test_images_without_files_are_sent_as_they_are(
    sample_images: NDArray[np.uint8], checkpoint: Checkpoint, runner: Runner, service: ServiceProcess
) -> None:
    """A data set that has no files of its own can be evaluated through the service all the same."""
    labels = torch.zeros(len(sample_images), dtype=torch.int64)
    bare = Dataset(torch.from_numpy(sample_images), labels, checkpoint.metadata.class_names)
    online = HttpPredictor(service.url, checkpoint).predict(bare)
    assert torch.equal(online.labels, RunnerPredictor(runner).predict(bare).labels)


def test_every_stream_of_a_runner_takes_its_share(sample_images: NDArray[np.uint8], checkpoint: Checkpoint) -> None:
    """However many batches and streams there are, each image's answer stands at its own place."""
    labels = torch.zeros(len(sample_images), dtype=torch.int64)
    data = Dataset(torch.from_numpy(sample_images), labels, checkpoint.metadata.class_names)
    results = []
    for streams, batch in ((1, 64), (2, 3), (3, 7)):
        runner = open_runner(checkpoint, RunnerOptions(device="cpu", streams=streams, max_batch_size=batch, precision="fp32"))
        results.append(RunnerPredictor(runner).predict(data).probabilities)
        runner.close()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4)


class ByPosition:
    """Knows the label of every image in one view, and says so with the scores it was given."""

    name = "by-position"

    def __init__(self, plain: float, mirrored: float) -> None:
        self._scores = {False: plain, True: mirrored}

    def predict(self, data: Dataset) -> Predictions:
        """Give the true class the view's score and the next class the rest."""
        score = self._scores[not data.paths]
        probabilities = torch.zeros(len(data), len(data.class_names))
        rows = torch.arange(len(data))
        probabilities[rows, data.labels] = score
        probabilities[rows, (data.labels + 1) % len(data.class_names)] = 1 - score
        return Predictions.of(probabilities)


@pytest.mark.parametrize(("plain", "mirrored", "top1", "averaged"), [(0.4, 0.9, 0.0, 1.0), (0.6, 0.1, 1.0, 0.0)])
def test_tta_averages_an_image_with_its_mirror_image(
    plain: float, mirrored: float, top1: float, averaged: float, data: Dataset, checkpoint: Checkpoint
) -> None:
    """With test-time augmentation the mean of both views decides, and the single view is reported beside it."""
    result = evaluate(checkpoint, data, ByPosition(plain, mirrored), tta=True)
    assert result.tta is not None
    assert (result.plain.top1, result.tta.top1) == (top1, averaged)
    assert evaluate(checkpoint, data, ByPosition(plain, mirrored)).tta is None


def test_the_average_is_that_of_probabilities() -> None:
    """Two views weigh the same."""
    mean = average(Predictions.of(torch.tensor([[0.9, 0.1]])), Predictions.of(torch.tensor([[0.2, 0.8]])))
    torch.testing.assert_close(mean.probabilities, torch.tensor([[0.55, 0.45]]))


def test_precisions_stand_side_by_side(data: Dataset, checkpoint: Checkpoint) -> None:
    """The table has a column for each precision, and says on how many images the others agree with the first."""
    part = data.subset(torch.arange(0, len(data), 8))
    options = RunnerOptions(runtime="openvino", device="cpu")
    evaluations = evaluate_runners(checkpoint, ["fp32", "int8"], options, partial(evaluate, checkpoint, part))
    table = as_table(evaluations)
    assert table.splitlines()[0].split() == ["openvino-fp32", "openvino-int8"]
    accuracies = [f"{evaluation.plain.top1 * 100:.2f}" for evaluation in evaluations]
    assert next(line for line in table.splitlines() if line.startswith("top-1")).split() == [
        "top-1", "accuracy", accuracies[0], "%", accuracies[1], "%"
    ]  # fmt: skip
    same = (evaluations[0].predictions.labels == evaluations[1].predictions.labels).double().mean().item()
    assert f"{same * 100:.2f} %" in next(line for line in table.splitlines() if line.startswith("same class"))
    typicality = [evaluation.predictions.typicality for evaluation in evaluations]
    assert typicality[0] is not None
    assert typicality[1] is not None
    furthest = (typicality[0] - typicality[1]).abs().max().item()
    assert f"{furthest * 100:.2f} %" in next(line for line in table.splitlines() if line.startswith("typicality: largest"))
    assert json.loads(json.dumps(as_dict(evaluations[1])))["top1"] == evaluations[1].plain.top1


def test_a_service_with_another_model_is_refused(checkpoint: Checkpoint, service: ServiceProcess, finished_run: Path) -> None:
    """Figures of one model are never printed under the name of another."""
    other = load_checkpoint(finished_run / "model.safetensors")
    with pytest.raises(
        EvaluationError, match=f"version {checkpoint.version}, and the checkpoint is tiny version {other.version}"
    ):
        HttpPredictor(service.url, other)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [("http://127.0.0.1:1", EvaluationError, "cannot be asked for its labels"), ("ftp://x", ValueError, "not an address")],
)
def test_no_service_is_one_line(url: str, error: type[Exception], message: str, checkpoint: Checkpoint) -> None:
    """An address where nothing answers, or none at all, is named in the error."""
    with pytest.raises(error, match=message):
        HttpPredictor(url, checkpoint)


def test_the_command_prints_what_was_measured(
    many_images: Path, checkpoint_path: Path, service: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """``evaluate`` gives the same figures for a runtime here and for the service, as a table or as JSON."""
    assert main(["evaluate", str(checkpoint_path), "--data", str(many_images), "--json"]) == 0
    (offline,) = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(checkpoint_path), "--data", str(many_images), "--url", service.url, "--tta", "--json"]) == 0
    (online,) = json.loads(capsys.readouterr().out)
    assert offline["images"] == online["images"] == 40 * VIEWS
    assert (offline["top1"], offline["per_class"]) == (online["top1"], online["per_class"])
    assert "tta_top1" in online
    assert "tta_top1" not in offline
    assert main(["evaluate", str(checkpoint_path), "--data", str(many_images)]) == 0
    table = capsys.readouterr().out
    assert f"{offline['top1'] * 100:.2f} %" in table
    assert f"on 320 images, {many_images}" in table
    assert "accuracy of airplane" in table
