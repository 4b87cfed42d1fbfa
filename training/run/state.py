"""The state of a run on disk, from which it continues to the same bits after a kill at any moment.

Data order and augmentation are functions of (seed, epoch, step), so no generator's state needs saving.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.model.atomic_file import replacing
from training.errors import RunError

STATE_FILE = "state.pt"


@dataclass
class TrainingState:
    """Progress of a run: ``step`` of ``epoch`` is the next one to make; the sums are of the epoch so far.

    ``identity`` is what must not change over the life of a run: recipe, seed, classes, number of images.
    """

    identity: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    elapsed_s: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def capture(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Refer to the current weights and the state of the optimisers."""
        self.model, self.optimizers = model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]

    def restore(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Load what ``capture`` stored."""
        model.load_state_dict(self.model)
        for optimizer, saved in zip(optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(saved)

    def end_epoch(self, row: dict[str, float]) -> None:
        """Add ``row`` to the history and go to the first step of the next epoch."""
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.correct, self.seen = 0.0, 0.0, 0.0


def save_state(folder: Path, state: TrainingState) -> None:
    """Write the state whole or not at all; raise WriteError when it cannot be written."""
    data = io.BytesIO()  # torch's zip writer turns a full disk into a RuntimeError
    torch.save({name: getattr(state, name) for name in TrainingState.__dataclass_fields__}, data)
    with replacing(folder / STATE_FILE) as file:
        file.write(data.getbuffer())


def load_state(folder: Path, identity: dict[str, Any]) -> TrainingState | None:
    """Return the state saved in ``folder``, or None; raise RunError when it is damaged or of another ``identity``."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        fields = torch.load(path, map_location="cpu", weights_only=True)
        state = TrainingState(**fields)
    except Exception as error:  # torch.load fails on damaged files in every way there is
        raise RunError(f"{path} is damaged or of another version; remove it to start the run anew") from error
    before = {key: state.identity.get(key) for key in identity}
    if different := list(_differences(before, identity)):
        raise RunError(f"{folder} holds a run with another {', '.join(different)}; choose another --out (RUN of make)")
    return state


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Name what is not as it was, down to the field of a recipe, with its numbers and words; digests say nothing."""
    # ``least_steps`` has done its work: it is in the epochs.
    for key in (key for key in now | before if before.get(key) != now.get(key) and key != "least_steps"):
        old, new = before.get(key), now.get(key)
        if not isinstance(old, dict) or not isinstance(new, dict):
            yield f"{key} ({old}, now {new})" if isinstance(new, int | float) else key
        elif old.get("name") != new.get("name"):
            yield f"{key} ({old['name']}, now {new['name']})"
        else:
            yield from (f"{key}: {field}" for field in _differences(old, new))
