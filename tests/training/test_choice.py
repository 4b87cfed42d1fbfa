"""Without a recipe the data decides, and the run ends in a model whether or not weights can be downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from service.model.checkpoint import load_checkpoint
from service.settings import DEFAULT_CHECKPOINT
from tests.training.image_folders import write_classes
from training.__main__ import main
from training.choice import choose
from training.data.survey import CIFAR10, Survey, survey
from training.errors import DataError

SHIPPED = str(DEFAULT_CHECKPOINT)


@pytest.mark.parametrize(
    ("data", "on_gpu", "recipe", "initial", "size"),
    [
        (Survey(300, 4, 375.0), False, "finetune", "imagenet", None),
        (Survey(49_999, 1000, 64.0), True, "finetune", "imagenet", None),
        (Survey(300, 4, 63.0), False, "finetune", SHIPPED, None),
        (Survey(300, 50, 32.0), False, "cpu", None, None),
        (Survey(50_000, 4, 375.0), True, "best", None, 64),
        (CIFAR10, False, "cpu", None, None),
        (CIFAR10, True, "best", None, None),
    ],
)
def test_the_data_decides(data: Survey, on_gpu: bool, recipe: str, initial: str | None, size: int | None) -> None:
    """Few photographs begin with ImageNet's weights, few small images with the service's, many with random ones."""
    choice = choose(data, on_gpu=on_gpu)
    assert (choice.recipe, choice.initial, choice.size) == (recipe, initial, size)
    assert f"{data.images:,} files of {data.classes} classes" in str(choice)


@pytest.mark.parametrize(
    ("classes", "told"), [((), "holds no class folders"), (("a",), "holds one class folder"), (("a", "b"), "hold no image")]
)
def test_a_folder_without_images_is_refused_before_a_choice(classes: tuple[str, ...], told: str, tmp_path: Path) -> None:
    """A flat folder, or one too deep, is told as such, not as few and small images."""
    for name in classes:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=told):
        survey(tmp_path)


def test_weights_that_are_asked_for_are_taken() -> None:
    """Whatever the data is, they are fine-tuned."""
    assert choose(CIFAR10, "weights.pth", on_gpu=False).initial == "weights.pth"


def test_a_survey_counts_all_parts_and_measures_the_shorter_side(tmp_path: Path) -> None:
    """Files that are no images do not count, damaged ones are not measured."""
    write_classes(tmp_path / "train", 3)
    write_classes(tmp_path / "val", 2)
    for path in tmp_path.glob("*/*/*.jpg"):
        Image.new("RGB", (200, 90)).save(path)
    (tmp_path / "val" / "red" / "0000.jpg").write_bytes(b"damaged")
    (tmp_path / "val" / "red" / "notes.txt").write_text("no image")
    assert survey(tmp_path) == Survey(15, 3, 90.0)


@pytest.mark.slow
@pytest.mark.parametrize("reached", [True, False])
def test_photographs_are_fine_tuned_without_naming_anything(
    reached: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From ImageNet's weights where torchvision has them; else from the service's, and the log says what to do for better."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    if reached:
        cached = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
        cached.parent.mkdir(parents=True)
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18().state_dict(), cached)
    data = write_classes(tmp_path / "my photos", 5)
    for path in data.glob("*/*.jpg"):
        with Image.open(path) as image:
            image.resize((80, 64)).save(path)
    assert main(["train", "--data", "my photos", "--device", "cpu", "--epochs", "2", "--size", "32"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path("runs/my photos/model.safetensors")
    metadata = load_checkpoint(path).metadata
    assert metadata.architecture == ("resnet18-imagenet" if reached else "resnet18")
    assert (metadata.recipe["name"], metadata.name, metadata.input.size) == ("finetune", "my-photos", 32)
    assert "15 files of 3 classes, the shorter side 64 pixels, are few photographs" in caplog.text
    assert ("resnet18-f37072fd.pth elsewhere" in caplog.text) != reached
    assert ("resnet18-cifar10.safetensors at 64 pixels instead" in caplog.text) != reached
