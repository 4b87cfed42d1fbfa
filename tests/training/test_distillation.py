"""A network that learns from a teacher: where the teacher comes from, and what its answers are to the loss."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from service.model.checkpoint import Checkpoint, load_checkpoint
from service.model.images import InputSpec
from service.model.network import model_from_checkpoint
from tests.support.tiny_network import tiny_checkpoint, tiny_images
from tests.training.run.test_resume import assert_continues, at_step, crash
from tests.training.tiny_run import TINY
from training.__main__ import main
from training.data.augment import normalise
from training.data.dataset import Source
from training.distillation import TEACHER_FOLDER, prepare_teacher
from training.errors import Interrupted, RunError
from training.recipes import RECIPES, Distillation
from training.run.run_folder import CHECKPOINT_FILE
from training.step.network import build_model
from training.step.optimizer import make_optimizers
from training.step.parallel import Parallel
from training.step.teacher import Teacher
from training.step.update import learn
from training.train import RunOptions, train

DISTILLATION = Distillation("tiny_teacher", scale=2, temperature=3.0, weight=0.75)
TAUGHT = replace(TINY, name="taught", epochs=2, distillation=DISTILLATION)


@pytest.fixture
def tiny_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny recipe as a teacher's, over two epochs."""
    monkeypatch.setitem(RECIPES, "tiny_teacher", replace(TINY, name="tiny_teacher", epochs=2))


@pytest.fixture(scope="session")
def teacher(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A teacher of the classes of ``source``, barely trained."""
    return load_checkpoint(train(replace(TINY, epochs=1), source, RunOptions(tmp_path_factory.mktemp("teacher"))))


def taught_by(checkpoint: Checkpoint, spec: InputSpec, precision: str = "fp32") -> Teacher:
    return Teacher(checkpoint, DISTILLATION, spec, precision, torch.device("cpu"))


# Where it comes from


@pytest.mark.usefixtures("tiny_teacher")
def test_a_teacher_is_trained_once_on_larger_images(source: Source, tmp_path: Path) -> None:
    """It gets a folder inside the student's and the images at twice the side; one that is finished is only loaded."""
    options = RunOptions(tmp_path, model_name="pupil")
    checkpoint = prepare_teacher(DISTILLATION, source, options, Parallel())
    assert checkpoint.metadata.input.size == 64
    assert checkpoint.metadata.name == "pupil-teacher"
    assert load_checkpoint(tmp_path / TEACHER_FOLDER / CHECKPOINT_FILE).version == checkpoint.version
    with at_step(0, crash):
        again = prepare_teacher(DISTILLATION, source, options, Parallel())
    assert again.version == checkpoint.version


@pytest.mark.usefixtures("tiny_teacher")
def test_a_teacher_whose_run_was_interrupted_is_trained_to_its_end(source: Source, tmp_path: Path) -> None:
    """The same call continues the teacher's run."""
    with at_step(8, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(Interrupted):
        prepare_teacher(DISTILLATION, source, RunOptions(tmp_path), Parallel())
    checkpoint = prepare_teacher(DISTILLATION, source, RunOptions(tmp_path), Parallel())
    assert checkpoint.metadata.metrics["epochs_done"] == 2
    assert "test_accuracy" in checkpoint.metadata.metrics


def test_a_teacher_from_a_file_is_taken_as_it_is(source: Source, finished_run: Path, tmp_path: Path) -> None:
    """None is trained then."""
    path = finished_run / CHECKPOINT_FILE
    with at_step(0, crash):
        checkpoint = prepare_teacher(DISTILLATION, source, RunOptions(tmp_path), Parallel(), path)
    assert checkpoint.version == load_checkpoint(path).version
    assert not (tmp_path / TEACHER_FOLDER).exists()


def test_a_teacher_of_other_classes_is_refused(source: Source, checkpoint_path: Path, tmp_path: Path) -> None:
    """The message says which classes it knows, and what to do."""
    with pytest.raises(RunError, match=r"knows the classes airplane, .*; leave --teacher out"):
        prepare_teacher(DISTILLATION, source, RunOptions(tmp_path), Parallel(), checkpoint_path)


def test_a_teacher_without_use_is_refused(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that does not distil takes none, which is said before any image is read."""
    assert main(["train", "--recipe", "quick", "--data", str(data_folder), "--teacher", "x.safetensors"]) == 2
    assert "recipe quick has no use for --teacher" in capsys.readouterr().err


# The loss


def test_a_teacher_answers_as_its_network_does(sample_images: np.ndarray) -> None:
    """For a student's batch, normalised otherwise and smaller, it gives what its network gives for the enlarged images."""
    checkpoint = tiny_checkpoint(size=64)
    images = torch.from_numpy(sample_images[:7])
    large = F.interpolate(images.float(), size=(64, 64), mode="bilinear", align_corners=False)
    network, spec = model_from_checkpoint(checkpoint), checkpoint.metadata.input
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = network((large - mean) / std)
        actual = taught_by(checkpoint, InputSpec())(normalise(images, InputSpec()))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_student_that_answers_as_the_teacher_has_the_labels_loss_alone() -> None:
    """The divergence is then 0, and the labels keep their share."""
    spec = tiny_checkpoint().metadata.input
    teacher = taught_by(tiny_checkpoint(), spec)
    batch = normalise(torch.from_numpy(tiny_images()), spec)
    loss = teacher.loss(teacher(batch), batch, hard=torch.tensor(2.0))
    torch.testing.assert_close(loss, torch.tensor(0.5))


def test_the_divergence_is_that_of_the_softened_answers() -> None:
    """The mean over the images of KL(teacher, student) at the temperature, times its square, in its share."""
    spec = tiny_checkpoint().metadata.input
    teacher = taught_by(tiny_checkpoint(), spec)
    batch = normalise(torch.from_numpy(tiny_images()), spec)
    logits = torch.randn(len(batch), 3, generator=torch.Generator().manual_seed(0))
    theirs, ours = (np.exp(values.double().numpy() / 3.0) for values in (teacher(batch), logits))
    p, q = theirs / theirs.sum(1, keepdims=True), ours / ours.sum(1, keepdims=True)
    expected = 0.25 * 2.0 + 0.75 * 9.0 * (p * np.log(p / q)).sum(1).mean()
    assert teacher.loss(logits, batch, hard=torch.tensor(2.0)).item() == pytest.approx(expected, rel=1e-4)


def test_only_the_student_learns() -> None:
    """A step moves the student's weights and leaves the teacher's."""
    checkpoint = tiny_checkpoint(num_classes=10)
    teacher = taught_by(checkpoint, InputSpec(), "bf16")
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    student = build_model("resnet18", TINY.config)
    weights = {name: value.detach().clone() for name, value in student.named_parameters()}
    optimizers = make_optimizers(student, TINY.optimizer)
    loss, _ = learn(student, torch.randn(8, 3, 32, 32), torch.arange(8), optimizers, TAUGHT, teacher)
    assert loss.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert not any(torch.equal(value, weights[name]) for name, value in student.named_parameters() if value.ndim > 1)


# The run


def test_a_taught_run_continues_to_the_same_result(source: Source, teacher: Checkpoint, tmp_path: Path) -> None:
    """SIGINT in a step of a student changes nothing but the time."""
    stopped = assert_continues(partial(train, TAUGHT, source, teacher_checkpoint=teacher), tmp_path)
    with pytest.raises(RunError, match="another teacher; choose another --out"):
        train(TAUGHT, source, stopped, teacher_checkpoint=replace(teacher, version="f" * 12))


@pytest.mark.usefixtures("tiny_teacher")
def test_one_command_trains_both(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher comes first, and the student's card says how it was taught."""
    monkeypatch.setitem(RECIPES, "taught", TAUGHT)
    assert main(["train", "--recipe", "taught", "--data", str(data_folder), "--out", str(tmp_path), "--device", "cpu"]) == 0
    path = tmp_path / CHECKPOINT_FILE
    assert capsys.readouterr().out == f"{path}\n"
    checkpoint = load_checkpoint(path)
    assert checkpoint.metadata.input.size == 32
    assert '"teacher": "tiny_teacher"' in (tmp_path / "MODEL_CARD.md").read_text()
