"""The command line: what a user gets wrong is one line that says what to do, and exit status 2."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.model.checkpoint import load_checkpoint, save_checkpoint
from tests.training.image_folders import write_classes
from tests.training.tiny_run import TINY
from training.__main__ import main
from training.recipes import RECIPES


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with status 2; give its error line."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err.strip().splitlines()[0]


def test_an_unknown_recipe_lists_the_known(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names are told before any image is read."""
    said = error_of(["train", "--recipe", "bset", "--data", str(data_folder)], capsys)
    assert said == f"error: unknown recipe 'bset'; known: {', '.join(RECIPES)}"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--seed", "-1"], "--seed must be 0 to"),
        (["--size", "10"], "--size must be at least 16, not 10"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["--download-dir", "x", "--data", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_bad_setting_is_named(
    extra: list[str], message: str, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each setting has its limits, and the message says which was passed."""
    out = str(tmp_path / "run")
    assert message in error_of(["train", "--recipe", "quick", "--data", str(data_folder), "--out", out, *extra], capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_named(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the way of the run folder is an error before the first step."""
    (tmp_path / "file").write_text("")
    said = error_of(["train", "--recipe", "quick", "--data", str(data_folder), "--out", str(tmp_path / "file")], capsys)
    assert said.startswith(f"error: cannot make the run folder {tmp_path / 'file'}")


def test_too_few_images_for_validation_are_refused(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one training image a class there is nothing to choose by."""
    for part in ("train", "test"):
        for path in sorted((data_folder / "train").glob("*/0000.jpg")):
            (tmp_path / part / path.parent.name).mkdir(parents=True)
            (tmp_path / part / path.parent.name / path.name).write_bytes(path.read_bytes())
    said = error_of(["train", "--recipe", "quick", "--data", str(tmp_path), "--out", str(tmp_path / "run")], capsys)
    assert "every class needs at least 2 training images" in said


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "export", "summary"])
def test_no_checkpoint_is_named(command: str, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that reads a checkpoint says where there is none."""
    data = ["--data", str(data_folder)] if command in ("evaluate", "calibrate") else []
    extra = ["--onnx", str(tmp_path / "x.onnx")] if command == "export" else []
    said = error_of([command, str(tmp_path / "absent.safetensors"), *data, *extra], capsys)
    assert f"there is no checkpoint at {tmp_path / 'absent.safetensors'}" in said


@pytest.mark.parametrize("change", ["architecture", "widths", "weights"])
def test_a_checkpoint_of_another_architecture_is_refused(
    change: str, finished_run: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that does not fit the network it names is told as such by every command, and never half loaded."""
    checkpoint = load_checkpoint(finished_run / "model.safetensors")
    metadata, weights = checkpoint.metadata, dict(checkpoint.weights)
    if change == "architecture":
        metadata = metadata.model_copy(update={"architecture": "resnet50"})
    elif change == "widths":
        metadata = metadata.model_copy(update={"config": replace(metadata.config, widths=(8, 16, 32, 64))})
    else:
        del weights["stages.1.0.conv2.weight"]
    path = tmp_path / "other.safetensors"
    save_checkpoint(path, weights, metadata)
    for arguments in (["summary", str(path)], ["evaluate", str(path), "--data", str(data_folder), "--device", "cpu"]):
        assert "architecture" in error_of(arguments, capsys)


def test_evaluating_on_foreign_classes_is_refused(
    checkpoint_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of classes that the checkpoint does not have are no test of it."""
    said = error_of(["evaluate", str(checkpoint_path), "--data", str(data_folder)], capsys)
    assert "has classes that are not among airplane, automobile" in said
    said = error_of(["calibrate", str(checkpoint_path), "--data", str(data_folder)], capsys)
    assert "not the checkpoint's" in said or "was not made by train" in said


def test_a_precision_that_a_runtime_does_not_have_is_named(
    finished_run: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the precision and who could have it."""
    path = str(finished_run / "model.safetensors")
    said = error_of(["evaluate", path, "--data", str(data_folder), "--runtime", "torch", "--precision", "int8"], capsys)
    assert "runtime 'torch' has no int8 form; use runtime 'openvino'" in said


@pytest.mark.parametrize(("part", "images"), [(None, 30), ("test", 30), ("train", 120)])
def test_evaluate_takes_the_part_it_is_asked_for(
    part: str | None, images: int, finished_run: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder with train/ and test/ it is test/ unless someone says otherwise."""
    extra = ["--part", part] if part else []
    assert main(["evaluate", str(finished_run / "model.safetensors"), "--data", str(data_folder), *extra]) == 0
    assert f"on {images} images" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "images"), [(None, 120), ("all", 120), ("test", 24), ("train", 96)])
def test_a_single_folder_is_evaluated_whole_or_as_training_split_it(
    part: str | None, images: int, finished_run: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of classes that is not the training's is all test images, unless a part is asked for."""
    extra = ["--part", part] if part else []
    assert main(["evaluate", str(finished_run / "model.safetensors"), "--data", str(data_folder / "train"), *extra]) == 0
    assert f"on {images} images" in capsys.readouterr().out


def test_summary_lists_the_layers(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The untrained network has the parameters and mult-adds it is known for; a checkpoint has its own."""
    assert main(["summary"]) == 0
    said = capsys.readouterr().out
    assert "Total params: 11,154,890" in said
    assert "135.15" in said
    assert main(["summary", str(finished_run / "model.safetensors")]) == 0
    assert "11,154,890" not in capsys.readouterr().out
    assert main(["summary", "--architecture", "resnet18-imagenet"]) == 0
    assert "Total params: 11,689,512" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["calibrate"], ["export"], ["summary"]])
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m training --help`` works everywhere and names each command or its flags."""
    monkeypatch.setattr("sys.argv", ["training", *command, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path("training/__main__.py", run_name="__main__")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert (
        all(name in said for name in ("train", "calibrate", "evaluate", "export", "summary")) if not command else "--" in said
    )


def test_deterministic_runs_are_asked_of_torch(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag reaches torch, which refuses what it cannot repeat, and is taken back by the next run without it."""
    before = torch.are_deterministic_algorithms_enabled()
    assert not before
    arguments = ["train", "--recipe", "quick", "--data", str(data_folder), "--device", "cpu"]
    (tmp_path / "file").write_text("")
    for flag, expected in ((["--deterministic"], True), ([], False)):
        error_of([*arguments, "--out", str(tmp_path / "file"), *flag], capsys)
        assert torch.are_deterministic_algorithms_enabled() is expected


def dry_make(*arguments: str) -> str:
    """What ``make`` would run, on a machine without a GPU and in a checkout without any virtual environment."""
    # Under `make test` the variables of that make would reach this one, and it would say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "-n", *arguments, "ACCELERATOR=", "VENV=.no-such-environment"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_what_it_downloads_and_takes_torch_for_a_cpu() -> None:
    """The size comes first, pip shows its progress, and PyTorch's index is asked for two builds that fit each other."""
    said = dry_make("train")
    builds = "".join(f" {line}+cpu" for line in Path("requirements/training-torch.txt").read_text().split())
    size, cpu, usual = said.index("downloads about 500 MB"), said.index(f"whl/cpu{builds} "), said.index(".[training]")
    assert size < cpu < usual
    assert "--quiet" not in said[size:]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_quotes_what_it_is_given() -> None:
    """Spaces and quotes in a folder or a name reach the program as they are."""
    values = ["DATA=my mother's photos", "RUN=runs/a b", "NAME=my model", "SIZE=64", "EPOCHS=3", "ARGS=--patience 4"]
    said = dry_make("train", "RECIPE=quick", *values)
    command = shlex.split(said[said.index("-m training train") :].replace("\\\n", ""))
    expected = ["--data", "my mother's photos", "--recipe", "quick", "--out", "runs/a b", "--name", "my model"]
    assert command == ["-m", "training", "train", *expected, "--size", "64", "--epochs", "3", "--patience", "4"]


def test_own_photos_from_the_command_to_the_next_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One paragraph comes before the first epoch, uneven classes are named, and the last lines say how to go on."""
    caplog.set_level("INFO")
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    data = write_classes(tmp_path / "my photos", 60)
    for path in sorted((data / "red").iterdir())[10:]:
        path.unlink()
    (data / "green" / "notes.txt").write_text("no image")
    out = tmp_path / "runs" / "a b"
    arguments = ["--data", str(data), "--out", str(out), "--device", "cpu", "--epochs", "2", "--batch-size", "8"]
    assert main(["train", "--recipe", "tiny", *arguments, "--learning-rate", "0.01"]) == 0
    metadata = load_checkpoint(Path(capsys.readouterr().out.strip())).metadata
    assert metadata.name == "a-b"
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["batch_size"], recipe["optimizer"]["learning_rate"]) == (2, 8, 0.01)
    text = caplog.text
    assert "3 classes: bars 43, green 44, red 7" in text
    for said in ("Left out: 1 .txt file.", "first weights random", "32 x 32 pixels, batch 8, 2 epochs of 11 steps", "median"):
        assert said in text
    assert "uneven classes: green has 44 images and red 7; every class is drawn equally often" in text
    assert text.index("3 classes") < text.index("test images") < text.index(" are right (balanced accuracy ")
    quoted = shlex.quote(str(out / "model.safetensors"))
    assert f"SERVICE_CHECKPOINT={quoted} make serve" in text
    caplog.clear()
    assert main(["train", "--recipe", "tiny", *arguments, "--learning-rate", "0.01"]) == 0
    assert f"{out} is finished; nothing to train" in caplog.text
    assert "steps in all" not in caplog.text
    capsys.readouterr()
    evaluate = f"evaluate {quoted} --data {shlex.quote(str(data))}"
    assert f"training {evaluate}" in text
    for part, images, warning in (
        ([], 26, ""),
        (["--part", "all"], 130, "trained on most"),
        (["--split-seed", "1"], 130, "not those of"),
    ):
        caplog.clear()
        assert main([*shlex.split(evaluate), *part]) == 0
        assert f"on {images} images" in capsys.readouterr().out, "by default what the training held out"
        assert warning in caplog.text if warning else "no test" not in caplog.text
    assert f"training export {quoted} --onnx" in text
    assert "test_top5_accuracy" not in metadata.metrics

    (data / "red" / "another.jpg").write_bytes((data / "red" / "0000.jpg").read_bytes())
    said = error_of(["calibrate", str(out / "model.safetensors"), "--data", str(data)], capsys)
    assert "have changed since the run" in said
