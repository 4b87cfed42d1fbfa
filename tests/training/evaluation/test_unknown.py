"""Figures of typicality by hand, and the images it is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint
from training.__main__ import main
from training.data.dataset import Dataset
from training.data.folder import load_folder
from training.evaluation.http_predictor import HttpPredictor
from training.evaluation.unknown import Detection, detection, other_images

TEST_SET = Path("data/cifar10/test")


def test_every_figure_is_that_of_its_definition() -> None:
    """Of the eight pairs six are in order and one is equal."""
    found = detection(torch.tensor([0.02, 0.5, 0.6, 0.9]), torch.tensor([0.01, 0.5]), threshold=0.05)
    assert found == Detection(auroc=6.5 / 8, fpr95=0.5, flagged=0.5, data_flagged=0.25)


def test_noise_and_colours_have_the_size_of_the_data() -> None:
    """They are the same every time; the images that are given come first."""
    data = Dataset(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ("a", "b"), (Path("x"),) * 3)
    others = other_images(data, data)
    assert list(others) == ["images of other things", "noise", "single colours"]
    assert others["noise"].images.shape == others["single colours"].images.shape == (500, 3, 8, 8)
    assert others["noise"].images.float().std((2, 3)).min() > 40
    assert others["single colours"].images.float().std((2, 3)).max() == 0
    assert torch.equal(others["noise"].images, other_images(data)["noise"].images)


def test_the_command_measures_images_of_other_things(
    checkpoint_path: Path, image_paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--unknown`` takes a folder of any depth; noise and single colours are measured with it."""
    for path in image_paths:
        (tmp_path / "data" / path.stem.split("-")[0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path.stem.split("-")[0] / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other" / "deep").mkdir(parents=True)
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[::4] = 255
    Image.fromarray(stripes).save(tmp_path / "other" / "deep" / "stripes.png")
    arguments = ["evaluate", str(checkpoint_path), "--data", str(tmp_path / "data"), "--unknown", str(tmp_path / "other")]
    assert main([*arguments, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["unknown"]["images of other things"]["auroc"] > 0.9
    assert result["unknown"]["noise"]["flagged"] > 0.95
    assert main([*arguments[:-1], str(tmp_path / "none")]) == 2
    assert "none is no folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not TEST_SET.is_dir(), reason=f"needs CIFAR-10 in {TEST_SET}")
def test_the_service_flags_one_in_twenty_test_images(checkpoint: Checkpoint, service: ServiceProcess) -> None:
    """Of 2,000 images that no part of the fit has seen, each sent as its file, 4 to 6 % are below the threshold."""
    data = load_folder(TEST_SET, checkpoint.metadata.input, class_names=checkpoint.metadata.class_names)
    typicality = HttpPredictor(service.url, checkpoint).predict(data.subset(torch.arange(0, len(data), 5))).typicality
    assert typicality is not None
    assert 0.04 <= float((typicality < checkpoint.metadata.unknown_threshold).float().mean()) <= 0.06
