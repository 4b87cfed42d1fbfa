"""What the training program's tests share: small data on disk, and one finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import training.run.run_folder
from service.model.images import InputSpec
from tests.training.image_folders import write_classes
from tests.training.tiny_run import TINY
from training.data.dataset import Source
from training.data.folder import load_source
from training.train import RunOptions, train


@pytest.fixture(autouse=True)
def saved_after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' epochs are shorter than the time between two saves of a real run."""
    monkeypatch.setattr(training.run.run_folder, "SAVE_EVERY_S", 0.0)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` with 40 and ``test/`` with 10 JPEGs of each of three classes, in many sizes."""
    folder = tmp_path_factory.mktemp("own-images")
    write_classes(folder / "train", 40, seed=1)
    write_classes(folder / "test", 10, seed=2)
    return folder


@pytest.fixture(scope="session")
def source(data_folder: Path) -> Source:
    """The same images, loaded."""
    return load_source(data_folder, InputSpec())


@pytest.fixture(scope="session")
def finished_run(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the tiny recipe, seed 0, that nothing interrupted."""
    torch.manual_seed(99)  # a run does not depend on what drew random numbers before it
    out = tmp_path_factory.mktemp("finished-run")
    train(TINY, source, RunOptions(out, model_name="tiny"))
    return out
