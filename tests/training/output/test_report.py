"""The pictures show what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from service.model.atomic_file import WriteError
from service.model.checkpoint import Calibration
from training.data.dataset import Dataset
from training.evaluation.measurement import Predictions, measure
from training.output.report import draw_confusion, draw_curves, draw_mistakes, save_figure

NAMES = ("cat", "dog", "frog")
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
PROBABILITIES = torch.tensor(
    [[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.4], [0.0, 0.05, 0.95], [0.99, 0.01, 0.0]]
)
DATA = Dataset(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4) * 40, LABELS, NAMES)
ROW = {"train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 1.1, "val_accuracy": 0.4, "learning_rate": 0.1, "elapsed_s": 9.0}


def test_curves_show_every_epoch() -> None:
    """Each of the five columns is drawn over all epochs; a single epoch is a visible point."""
    figure = draw_curves([{"epoch": 1.0, **ROW}, {"epoch": 2.0, **ROW, "train_loss": 0.8}])
    lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for axes in figure.axes for line in axes.lines}
    assert lines.keys() == {"train_loss", "val_loss", "train_accuracy", "val_accuracy", "learning_rate"}
    assert lines["train_loss"] == [1.0, 0.8]
    assert all(line.get_marker() == "o" for axes in draw_curves([{"epoch": 1.0, **ROW}]).axes for line in axes.lines)


def test_the_confusion_shows_the_accuracy_of_each_class() -> None:
    """Rows are in percent of their class, and each class is labelled with its accuracy."""
    figure = draw_confusion(measure(Predictions.of(PROBABILITIES), LABELS, NAMES, Calibration()), NAMES)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat, 50.0 %", "dog, 100.0 %", "frog, 50.0 %"]
    assert {text.get_text() for text in axes.texts} == {"50.0", "100.0"}
    assert "66.67 % right" in axes.get_title()


def test_the_most_confident_error_comes_first() -> None:
    """Errors are shown by falling score, each with what was predicted and what it is."""
    titles = [axes.get_title() for axes in draw_mistakes(DATA, Predictions.of(PROBABILITIES)).axes]
    assert titles[:3] == ["cat 0.990\nis frog", "dog 0.700\nis cat", ""]


def test_a_model_without_errors_has_an_empty_picture() -> None:
    """Where nothing is wrong, nothing is shown, and the picture says so."""
    figure = draw_mistakes(DATA, Predictions.of(torch.nn.functional.one_hot(LABELS, 3).float()))
    assert figure.get_suptitle() == "no errors"


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A folder that is a file is told as such, and no part of a picture is left."""
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        save_figure(Figure(), tmp_path / "file" / "x.png")
    save_figure(Figure(), tmp_path / "x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.png"]
