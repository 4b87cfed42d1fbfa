"""The folder of a run: its recipe, one line per epoch, TensorBoard scalars, checkpoint and state."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from service.model.atomic_file import replacing
from service.model.checkpoint import CheckpointMetadata, save_checkpoint
from training.errors import RunError
from training.run.state import TrainingState, save_state

CHECKPOINT_FILE = "model.safetensors"
LOG_FILE = "log.csv"
RECIPE_FILE = "recipe.json"
TENSORBOARD_FOLDER = "tensorboard"
SAVE_EVERY_S = 10.0  # a kill costs at most this and the epoch under way

Row = dict[str, float]


class RunFolder:
    """The folder of one run, made if it is not there."""

    def __init__(self, path: Path) -> None:
        """Make the folder; raise RunError when that cannot be done."""
        self.path = path
        self.checkpoint = path / CHECKPOINT_FILE
        self._scalars: SummaryWriter | None = None
        self._saved_at = time.monotonic()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run folder {path}: {error.strerror or error}; choose another --out") from error

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        """Write the recipe as it is run."""
        write_text(self.path / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")

    def write_epoch(self, history: list[Row]) -> None:
        """Write one line per epoch of ``history``, and the last epoch as TensorBoard scalars."""
        row = history[-1]
        write_text(self.path / LOG_FILE, csv_text([row, *([epoch[name] for name in row] for epoch in history)]))
        epoch = int(row["epoch"])
        if self._scalars is None:  # what a killed run logged of this epoch and later ones is void
            self._scalars = SummaryWriter(str(self.path / TENSORBOARD_FOLDER), purge_step=epoch)
        for name, value in row.items():
            if name != "epoch":
                self._scalars.add_scalar(name, value, epoch)
        self._scalars.flush()

    def is_save_due(self, *, finished: bool) -> bool:
        """Whether to save after this epoch: ``SAVE_EVERY_S`` after the last time, and when the run is ``finished``."""
        return finished or time.monotonic() - self._saved_at >= SAVE_EVERY_S

    def save_checkpoint(self, weights: Mapping[str, NDArray[Any]], metadata: CheckpointMetadata) -> None:
        """Write the checkpoint whole or not at all; raise WriteError when it cannot be written."""
        save_checkpoint(self.checkpoint, weights, metadata)

    def save_state(self, state: TrainingState) -> None:
        """Write the state whole or not at all; raise WriteError when it cannot be written."""
        save_state(self.path, state)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """End the TensorBoard file."""
        if self._scalars is not None:
            self._scalars.close()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8; raise WriteError when it cannot be written."""
    with replacing(path) as file:
        file.write(text.encode())


def read_log(folder: Path) -> list[Row]:
    """Return the epochs that ``log.csv`` in ``folder`` lists; none when there is no such file."""
    path = folder / LOG_FILE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return ``rows``, the first one of titles, as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
