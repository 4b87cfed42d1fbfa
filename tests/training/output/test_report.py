"""The pictures show what was measured."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from service.model.atomic_file import WriteError
from service.model.checkpoint import Calibration, Checkpoint
from training.data.dataset import Dataset
from training.evaluation.measurement import Predictions, measure
from training.output import report
from training.output.report import (
    draw_confusion,
    draw_curves,
    draw_mistakes,
    font_families,
    mistakes_table,
    save_figure,
    write_report,
)

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


def test_errors_are_drawn_from_their_files_with_their_names(tmp_path: Path) -> None:
    """Sharper than the network's input; of a file that is gone since, that input is drawn."""
    paths = tuple(tmp_path / f"photo {index}.png" for index in range(6))
    Image.new("RGB", (640, 480)).save(paths[5])
    figure = draw_mistakes(replace(DATA, paths=paths), Predictions.of(PROBABILITIES))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["cat 0.990\nis frog\nphoto 5.png", "dog 0.700\nis cat\nphoto 1.png"]
    sizes = [np.asarray(axes.images[0].get_array()).shape for axes in figure.axes[:2]]
    assert sizes == [(192, 192, 3), (4, 4, 3)]


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


def test_the_table_of_mistakes_names_every_file_the_most_confident_first() -> None:
    """Path, label, prediction, score and typicality of each error; names with commas and quotes are read back as they are."""
    data = Dataset(DATA.images, LABELS, ("cat", 'a "dog", big', "frog"), tuple(Path(f"p/{i}.jpg") for i in range(6)))
    predictions = replace(Predictions.of(PROBABILITIES), typicality=torch.arange(6) / 10)
    rows = list(csv.DictReader(mistakes_table(data, predictions).splitlines()))
    assert rows == [
        {"path": "p/5.jpg", "label": "frog", "prediction": "cat", "score": "0.9900", "typicality": "0.5000"},
        {"path": "p/1.jpg", "label": "cat", "prediction": 'a "dog", big', "score": "0.7000", "typicality": "0.1000"},
    ]


def test_a_confusion_of_a_thousand_classes_has_a_bounded_size() -> None:
    """The picture stops growing, and above 60 classes has no labels, which would overlap."""
    for classes in (60, 1000):
        names = tuple(f"class {index}" for index in range(classes))
        labels = torch.arange(classes)
        probabilities = torch.nn.functional.one_hot(labels, classes).float()
        figure = draw_confusion(measure(Predictions.of(probabilities), labels, names, Calibration()), names)
        assert max(figure.get_size_inches()) <= 15
        texts = {label.get_text() for label in figure.axes[0].get_xticklabels()}
        assert ("class 7" in texts) == (classes == 60)


def test_balanced_accuracy_counts_each_class_once() -> None:
    """Nine right images of one class and one wrong of another are 90 % right, and balanced 50 %."""
    labels = torch.tensor([0] * 9 + [1])
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    measured = measure(Predictions.of(probabilities), labels, ("common", "rare"), Calibration())
    assert measured.top1 == pytest.approx(0.9)
    assert measured.balanced == pytest.approx(0.5)
    assert measured.confusion.tolist() == [[9, 0], [1, 0]]


def test_a_picture_that_fails_is_a_warning(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other files are written, and the log names the picture."""

    def fail(*_: object) -> Figure:
        raise ValueError("no room for a legend")

    monkeypatch.setattr(report, "draw_mistakes", fail)
    predictions = Predictions.of(PROBABILITIES)
    write_report(tmp_path, checkpoint, DATA, predictions, measure(predictions, LABELS, NAMES, Calibration()))
    assert "mistakes.png was not drawn: no room for a legend" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"MODEL_CARD.md", "confusion.csv", "confusion.png", "mistakes.csv"}


def test_letters_come_from_a_font_that_has_them() -> None:
    """A font of boxes is not one, though it claims every letter; one that is installed for the letters is found."""
    families = font_families("犬 кот")
    assert not any("Last Resort" in name for name in families)
    charmaps = [font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in families]
    known = {
        font.name for font in font_manager.fontManager.ttflist if ord("犬") in font_manager.get_font(font.fname).get_charmap()
    }
    assert any(ord("犬") in charmap for charmap in charmaps) == bool({name for name in known if "Last Resort" not in name})


def test_names_in_any_script_are_drawn_without_a_warning(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Letters that no font has, and signs that mathematics would use, do not stop or warn."""
    names = ("犬 $x^{", "кот", "ฝรั่ง_$")
    data = Dataset(DATA.images, LABELS, names)
    predictions = Predictions.of(PROBABILITIES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, checkpoint, data, predictions, measure(predictions, LABELS, names, Calibration()))
    assert (tmp_path / "confusion.png").exists()
    assert (tmp_path / "mistakes.png").exists()
