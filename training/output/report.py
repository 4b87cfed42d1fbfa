"""What people read after a run: curves, confusion, errors, the model card; of bounded size for any number of classes."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from service.errors import ServiceError
from service.image_files import read_file
from service.model.atomic_file import replacing
from service.model.checkpoint import Checkpoint
from service.model.images import InputSpec, decode_image
from training.data.dataset import Dataset
from training.evaluation.measurement import Measurement, Predictions
from training.output.model_card import model_card
from training.run.run_folder import Row, csv_text, read_log, write_text

logger = logging.getLogger(__name__)

CURVES_FILE, CONFUSION_FILE, MISTAKES_FILE, CARD_FILE = "curves.png", "confusion.png", "mistakes.png", "MODEL_CARD.md"
CONFUSION_TABLE_FILE, MISTAKES_TABLE_FILE = "confusion.csv", "mistakes.csv"
_MISTAKE_ROWS, _MISTAKE_COLUMNS = 4, 6
_MISTAKES = _MISTAKE_ROWS * _MISTAKE_COLUMNS
_PICTURE_SIZE = 192  # pixels of one error
_SHOWN_LETTERS = 24  # of a file's name, its end
_LARGEST_INCHES = 14.0
_MOST_LABELS = 60  # tick labels of a confusion picture; more would overlap


def write_report(
    folder: Path, checkpoint: Checkpoint, data: Dataset, predictions: Predictions, measurement: Measurement
) -> None:
    """Write every file of the report into ``folder``; ``predictions`` and ``measurement`` are of ``data``.

    The curves are those of the log there, if there is one.

    A picture that cannot be drawn is a warning in the log. Raises WriteError when a text file cannot be written.
    """
    write_text(folder / CARD_FILE, model_card(checkpoint))
    write_text(folder / MISTAKES_TABLE_FILE, mistakes_table(data, predictions))
    write_text(folder / CONFUSION_TABLE_FILE, confusion_table(measurement, data.class_names))
    pictures: dict[str, Callable[[], Figure]] = {
        CONFUSION_FILE: lambda: draw_confusion(measurement, data.class_names),
        MISTAKES_FILE: lambda: draw_mistakes(data, predictions),
    }
    if history := read_log(folder):
        pictures[CURVES_FILE] = lambda: draw_curves(history)
    texts = [*data.class_names, *(data.paths[index].name for index in mistakes(data, predictions)[:_MISTAKES] if data.paths)]
    with rc_context({"text.parse_math": False, "font.family": font_families("".join(texts))}):
        for name, draw in pictures.items():
            try:
                save_figure(draw(), folder / name)
            except Exception as error:  # the run is worth more than a picture of it
                logger.warning("%s was not drawn: %s", name, error)


def font_families(text: str) -> list[str]:
    """Return the default font, and installed fonts for the characters of ``text`` that it lacks."""
    default = "DejaVu Sans"
    families, missing = [default], {ord(letter) for letter in text if letter.isprintable()}
    missing -= font_manager.get_font(font_manager.findfont(default)).get_charmap().keys()
    for font in font_manager.fontManager.ttflist if missing else ():
        if font.name.startswith("Last Resort"):  # matplotlib's own: it has a box for every script, and no letter
            continue
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a damaged font, or one that was removed
            if found := missing & font_manager.get_font(font.fname).get_charmap().keys():
                families.append(font.name)
                missing -= found
    return families


def mistakes(data: Dataset, predictions: Predictions) -> list[int]:
    """Return the indices of all wrongly predicted images, the highest score first."""
    wrong = (predictions.labels != data.labels.cpu()).nonzero().flatten()
    scores = predictions.probabilities.max(1).values
    return [int(index) for index in wrong[scores[wrong].argsort(descending=True, stable=True)]]


def mistakes_table(data: Dataset, predictions: Predictions) -> str:
    """Return all errors as CSV, the highest score first. An image without a file has its index for its path."""
    scores, names = predictions.probabilities.max(1).values, data.class_names
    typicality = predictions.typicality
    rows = [
        (
            data.paths[index] if data.paths else index,
            names[int(data.labels[index])],
            names[int(predictions.labels[index])],
            f"{scores[index]:.4f}",
            "" if typicality is None else f"{typicality[index]:.4f}",
        )
        for index in mistakes(data, predictions)
    ]
    return csv_text([("path", "label", "prediction", "score", "typicality"), *rows])


def confusion_table(measurement: Measurement, class_names: tuple[str, ...]) -> str:
    """Return the number of images of each true class (rows) by predicted class (columns) as CSV."""
    rows = [(name, *counts) for name, counts in zip(class_names, measurement.confusion.tolist(), strict=True)]
    return csv_text([("label", *class_names), *rows])


def draw_curves(history: list[Row]) -> Figure:
    """Draw loss and accuracy of train and validation, and the learning rate, by epoch."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) == 1 else None
    for axes, title, columns in zip(
        figure.subplots(1, 3),
        ("loss", "accuracy", "learning rate"),
        (("train_loss", "val_loss"), ("train_accuracy", "val_accuracy"), ("learning_rate",)),
        strict=True,
    ):
        for column in columns:
            axes.plot(epochs, [row[column] for row in history], label=column, marker=marker)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_confusion(measurement: Measurement, class_names: tuple[str, ...]) -> Figure:
    """Draw where images of each class go, in percent of the class; the diagonal is the accuracy of each class."""
    counts = measurement.confusion.double()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy() * 100
    side = min(_LARGEST_INCHES, max(6.0, 0.7 * len(class_names)))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    positions = range(len(class_names))
    if len(class_names) <= _MOST_LABELS:
        shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in class_names]
        axes.set_xticks(positions, shown, rotation=45, ha="right")
        accuracies = [f"{shares[i, i]:.1f} %" if counts[i].sum() else "no images" for i in positions]
        axes.set_yticks(positions, [f"{name}, {accuracy}" for name, accuracy in zip(shown, accuracies, strict=True)])
    axes.set(
        title=f"{measurement.images} test images, {measurement.top1 * 100:.2f} % right", xlabel="predicted", ylabel="true class"
    )
    if len(class_names) <= 30:  # with more, the figures would overlap
        for row in positions:
            for column in positions:
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 50 else "black"
                    axes.text(column, row, f"{shares[row, column]:.1f}", ha="center", va="center", color=colour, fontsize=8)
    return figure


def draw_mistakes(data: Dataset, predictions: Predictions) -> Figure:
    """Draw the errors with the highest scores, each with the predicted class, its score, the true class and the file's name."""
    labels, scores = data.labels.cpu(), predictions.probabilities.max(1).values
    wrong = mistakes(data, predictions)[:_MISTAKES]
    rows = max(1, -(-len(wrong) // _MISTAKE_COLUMNS))
    figure = Figure(figsize=(2 * _MISTAKE_COLUMNS, 2.6 * rows + 0.6), layout="constrained")
    figure.suptitle("the most confident errors" if len(wrong) else "no errors")
    for position, axes in enumerate(figure.subplots(rows, _MISTAKE_COLUMNS).flat):
        axes.set_axis_off()
        if position < len(wrong):
            index = wrong[position]
            axes.imshow(_picture(data, index))
            predicted, true = data.class_names[int(predictions.labels[index])], data.class_names[int(labels[index])]
            name = f"\n{data.paths[index].name[-_SHOWN_LETTERS:]}" if data.paths else ""
            axes.set_title(f"{predicted} {scores[index]:.3f}\nis {true}{name}", fontsize=9)
    return figure


def _picture(data: Dataset, index: int) -> NDArray[np.uint8]:
    """Return an image for a person, uint8 (H, W, 3): what the network sees of its file, sharper where that can be read."""
    image = data.images[index].cpu().numpy()
    if data.paths:
        with contextlib.suppress(ServiceError, OSError):  # removed since it was read
            image = decode_image(read_file(data.paths[index]), InputSpec(size=max(_PICTURE_SIZE, image.shape[-1])))
    return image.transpose(1, 2, 0)


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, whole or not at all."""
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no installed font has the letter
        canvas.print_png(file)  # type: ignore[no-untyped-call]  # matplotlib's own
