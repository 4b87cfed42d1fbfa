"""What people look at after a run: curves, per-class accuracy, the most confident errors, the model card."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from service.model.atomic_file import replacing, write_text
from service.model.checkpoint import Checkpoint
from training.data.dataset import Dataset
from training.evaluation.measurement import Measurement, Predictions
from training.output.model_card import model_card
from training.run.run_folder import Row

CURVES_FILE, CONFUSION_FILE, MISTAKES_FILE, CARD_FILE = "curves.png", "confusion.png", "mistakes.png", "MODEL_CARD.md"
_MISTAKE_ROWS, _MISTAKE_COLUMNS = 4, 6


def write_report(
    folder: Path, checkpoint: Checkpoint, data: Dataset, predictions: Predictions, measurement: Measurement, history: list[Row]
) -> None:
    """Write every file of the report; ``predictions`` and ``measurement`` are of ``data``, ``history`` may be empty."""
    if history:
        save_figure(draw_curves(history), folder / CURVES_FILE)
    save_figure(draw_confusion(measurement, data.class_names), folder / CONFUSION_FILE)
    save_figure(draw_mistakes(data, predictions), folder / MISTAKES_FILE)
    write_text(folder / CARD_FILE, model_card(checkpoint))


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
    side = max(6.0, 0.7 * len(class_names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    positions = range(len(class_names))
    axes.set_xticks(positions, class_names, rotation=45, ha="right")
    axes.set_yticks(
        positions,
        [
            f"{name}, {shares[index, index]:.1f} %" if counts[index].sum() else f"{name}, no images"
            for index, name in enumerate(class_names)
        ],
    )
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
    """Draw the errors with the highest scores, each with the predicted class, its score, and the true class."""
    labels = data.labels.cpu()
    scores = predictions.probabilities.max(1).values
    wrong = (predictions.labels != labels).nonzero().flatten()
    wrong = wrong[scores[wrong].argsort(descending=True, stable=True)][: _MISTAKE_ROWS * _MISTAKE_COLUMNS]
    figure = Figure(figsize=(2 * _MISTAKE_COLUMNS, 2.4 * _MISTAKE_ROWS), layout="constrained")
    figure.suptitle("the most confident errors" if len(wrong) else "no errors")
    for position, axes in enumerate(figure.subplots(_MISTAKE_ROWS, _MISTAKE_COLUMNS).flat):
        axes.set_axis_off()
        if position < len(wrong):
            index = int(wrong[position])
            axes.imshow(data.images[index].permute(1, 2, 0).cpu().numpy())
            predicted, true = data.class_names[int(predictions.labels[index])], data.class_names[int(labels[index])]
            axes.set_title(f"{predicted} {scores[index]:.3f}\nis {true}", fontsize=9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, whole or not at all."""
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]  # matplotlib's own
