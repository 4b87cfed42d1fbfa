"""The progress bar of an epoch, and the sums that it shows."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from tqdm import tqdm

from training.run.state import TrainingState
from training.step.parallel import Parallel

_SHOW_EVERY = 16  # steps; to show the loss, the device has to be waited for


class EpochProgress:
    """One epoch of ``steps`` steps; ``state`` says which it is and where it stands, and gets its sums."""

    def __init__(self, state: TrainingState, epochs: int, steps: int, device: torch.device, parallel: Parallel) -> None:
        self._state = state
        self._epochs, self._steps = epochs, steps
        self._started = time.monotonic()
        self._parallel = parallel
        # Loss, right answers and images of this process; they stay on the device. What an earlier process left is counted once.
        before = [state.loss_sum, state.correct, state.seen] if parallel.is_first else [0.0, 0.0, 0.0]
        self._sums = torch.tensor(before, dtype=torch.float64, device=device)
        self._bar = tqdm(
            total=steps,
            initial=state.step,
            desc=f"epoch {state.epoch + 1}/{epochs}",
            unit="it",
            disable=not parallel.is_first,
        )

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, *, show: bool = False) -> None:
        """Count one step: its mean loss (), logits (N, num_classes) and targets, as ``training.train.learn`` has them.

        The sums go to the bar and the state after every sixteenth step, the last one, and when ``show`` asks for it; every
        process must ask alike.
        """
        count = len(targets)
        self._sums += torch.stack([loss.double() * count, count_correct(logits, targets), self._sums.new_tensor(count)])
        state = self._state
        if show or state.step == self._steps or state.step % _SHOW_EVERY == 0:
            state.loss_sum, state.correct, state.seen = self._parallel.total(self._sums).tolist()
            self._bar.set_postfix(_shown(self.averages()) | {"run_left": self._run_left()}, refresh=False)
        self._bar.update()

    def averages(self) -> dict[str, float]:
        """Return the loss and the accuracy that the state has of this epoch."""
        state = self._state
        return {"train_loss": state.loss_sum / state.seen, "train_accuracy": state.correct / state.seen}

    def _run_left(self) -> str:
        """Return how long all epochs still take, at the mean rate of the run so far."""
        done = (self._state.epoch + self._state.step / self._steps) / self._epochs
        elapsed_s = self._state.elapsed_s + time.monotonic() - self._started
        return tqdm.format_interval(elapsed_s / done * (1 - done))

    def close(self, **figures: float) -> None:
        """End the bar, with ``figures`` beside the averages."""
        if self._state.seen:
            self._bar.set_postfix(_shown(self.averages() | figures))
        self._bar.close()


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Count the right answers, int64 (); for mixed targets, float (N, num_classes), the larger share is the right one."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.argmax(1) == labels).sum()


def _shown(figures: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4f}" for name, value in figures.items()}
