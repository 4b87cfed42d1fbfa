"""The training loop, read from top to bottom.

Owns: the order of things in a run: data, network, epochs, checkpoint. Does not know: the command line, HTTP.
"""

from __future__ import annotations

import csv
import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from service.checkpoint import Calibration, CheckpointMetadata, load_checkpoint, save_checkpoint
from service.images import InputSpec
from service.model import build_model, config_dict, model_from_checkpoint, weights_of
from training.augment import augment, mix
from training.calibrate import activation_ranges, expected_calibration_error, fit_temperature, predict_logits
from training.data import Dataset, stratified_split
from training.optimizer import learning_rate_factor, make_optimizers
from training.patch_conv import use_patch_convolutions
from training.recipes import Recipe
from training.state import TrainingState, load_state, save_state

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "model.safetensors"
ARCHITECTURE = "resnet18"
_CALIBRATION_IMAGES = 1000


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside its recipe and data, and what should not change its result by more than rounding."""

    out: Path
    seed: int = 0
    device: torch.device = torch.device("cpu")
    deterministic: bool = False
    compile: bool = False
    model_name: str = "resnet18"
    input: InputSpec = InputSpec()


def train(recipe: Recipe, train_data: Dataset, test_data: Dataset, options: RunOptions) -> Path:
    """Train to the end of the recipe, from where the run folder stands; give the path of the final checkpoint.

    Raises Interrupted after SIGINT or SIGTERM, with the state saved.
    """
    torch.use_deterministic_algorithms(options.deterministic)
    device, spec = options.device, options.input
    num_classes = len(train_data.class_names)
    kept, held_out = stratified_split(train_data.labels, recipe.validation_images, options.seed)
    validation = train_data.subset(held_out).to(device)
    train_data = train_data.subset(kept).to(device)
    steps = len(train_data) // recipe.batch_size

    torch.manual_seed(options.seed)
    config = recipe.model.__class__(**{**config_dict(recipe.model), "num_classes": num_classes})
    model = build_model(ARCHITECTURE, config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = make_optimizers(model, recipe.optimizer)
    ema = build_model(ARCHITECTURE, config).to(device) if recipe.ema_decay else None
    if ema is not None:
        ema.load_state_dict(model.state_dict())
    if device.type == "cpu":
        use_patch_convolutions(model)

    identity = {
        "recipe": json.loads(json.dumps(recipe.to_dict())),
        "seed": options.seed,
        "classes": list(train_data.class_names),
        "number of images": len(train_data),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recipe.json").write_text(json.dumps(recipe.to_dict() | {"seed": options.seed}, indent=2) + "\n")
    state = load_state(options.out, identity)
    if state is None:
        state = TrainingState(identity, {}, [], None)
    else:
        model.load_state_dict(state.model)
        for optimizer, saved in zip(optimizers, state.optimizers, strict=True):
            optimizer.load_state_dict(saved)
        if ema is not None and state.ema is not None:
            ema.load_state_dict(state.ema)
        logger.info("continuing at epoch %d, step %d", state.epoch + 1, state.step)

    def keep_state() -> None:
        state.model = model.state_dict()
        state.optimizers = [optimizer.state_dict() for optimizer in optimizers]
        state.ema = None if ema is None else ema.state_dict()
        save_state(options.out, state)

    forward = torch.compile(model, dynamic=False) if options.compile else model
    best_model = model if ema is None else ema
    bf16 = recipe.precision == "bf16"
    with stop_signals() as stop:
        while state.epoch < recipe.epochs:
            order = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(_seed(options.seed, state.epoch)))
            order = order.to(device)
            model.train()
            started = time.monotonic()
            bar = tqdm(total=steps, initial=state.step, desc=f"epoch {state.epoch + 1}/{recipe.epochs}", unit="it", leave=True)
            for step in range(state.step, steps):
                torch.manual_seed(_seed(options.seed, state.epoch, step + 1))
                progress = (state.epoch + step / steps) / recipe.epochs
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * learning_rate_factor(recipe, progress)

                index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
                labels = train_data.labels[index]
                batch = augment(train_data.images[index], spec, recipe.augmentation, size_at(recipe, progress, spec.size))
                batch, targets = mix(batch, labels, recipe.augmentation, num_classes)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = forward(batch)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
                loss.backward()
                if recipe.optimizer.clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    update_ema(ema, model, recipe.ema_decay)

                state.loss_sum += loss.item() * len(index)
                state.correct += count_correct(logits, targets)
                state.seen += len(index)
                state.step = step + 1
                bar.update()
                bar.set_postfix(
                    train_loss=f"{state.loss_sum / state.seen:.4f}", train_accuracy=f"{state.correct / state.seen:.4f}"
                )
                if stop.requested:
                    bar.close()
                    state.elapsed_s += time.monotonic() - started
                    keep_state()
                    raise Interrupted

            logits = predict_logits(best_model, validation.images, spec, bf16=bf16)
            state.elapsed_s += time.monotonic() - started
            row = {
                "epoch": state.epoch + 1,
                "train_loss": state.loss_sum / state.seen,
                "train_accuracy": state.correct / state.seen,
                "val_loss": F.cross_entropy(logits, validation.labels).item(),
                "val_accuracy": accuracy(logits, validation.labels),
                "learning_rate": optimizers[0].param_groups[0]["lr"],
                "elapsed_s": round(state.elapsed_s, 1),
            }
            bar.set_postfix({key: f"{row[key]:.4f}" for key in ("train_loss", "train_accuracy", "val_accuracy")})
            bar.close()
            state.history.append(row)
            state.epoch, state.step = state.epoch + 1, 0
            state.loss_sum, state.correct, state.seen = 0.0, 0, 0
            write_log(options.out / "log.csv", state.history)
            keep_state()
            metadata = CheckpointMetadata(
                name=options.model_name,
                architecture=ARCHITECTURE,
                config=config_dict(config),
                class_names=train_data.class_names,
                input=spec,
                recipe=recipe.to_dict() | {"seed": options.seed},
                metrics={"epochs_done": state.epoch, "val_accuracy": row["val_accuracy"]},
            )
            save_checkpoint(options.out / CHECKPOINT_FILE, weights_of(best_model), metadata)

    return finish(options.out / CHECKPOINT_FILE, train_data, validation, test_data.to(device), state)


def finish(path: Path, train_data: Dataset, validation: Dataset, test_data: Dataset, state: TrainingState) -> Path:
    """Calibrate the checkpoint as it is stored, in half precision, read the test set once, and write both into it."""
    checkpoint = load_checkpoint(path)
    spec = checkpoint.metadata.input
    model = model_from_checkpoint(checkpoint).to(train_data.images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    temperature = fit_temperature(predict_logits(model, validation.images, spec), validation.labels)
    chosen = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_IMAGES]
    maxima, percentiles = activation_ranges(model, train_data.images[chosen.to(train_data.images.device)], spec)
    logits = predict_logits(model, test_data.images, spec)
    metrics: dict[str, Any] = {
        "epochs_done": state.epoch,
        "train_accuracy": state.history[-1]["train_accuracy"],
        "val_accuracy": state.history[-1]["val_accuracy"],
        "test_accuracy": accuracy(logits, test_data.labels),
        "test_ece_before": expected_calibration_error(logits.softmax(1), test_data.labels),
        "test_ece": expected_calibration_error((logits / temperature).softmax(1), test_data.labels),
        "test_images": len(test_data),
        "elapsed_s": round(state.elapsed_s, 1),
        "activation_percentile_99_99": percentiles,
    }
    calibration = Calibration(temperature=temperature, activation_max=maxima)
    metadata = checkpoint.metadata.model_copy(update={"calibration": calibration, "metrics": metrics})
    save_checkpoint(path, weights_of(model), metadata)
    logger.info("test accuracy %.2f %%, calibration error %.2f %%", metrics["test_accuracy"] * 100, metrics["test_ece"] * 100)
    return path


def size_at(recipe: Recipe, progress: float, full_size: int) -> int:
    """Give the side in pixels that images are trained at when the share ``progress`` of the run is done."""
    size = full_size
    for start, side in recipe.sizes:
        if progress >= start:
            size = side
    return size


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Give the share of rows of ``logits``, float (N, num_classes), whose largest is the label, int64 (N,)."""
    return count_correct(logits, labels) / len(labels)


def count_correct(logits: Tensor, targets: Tensor) -> int:
    """Count the right answers; for mixed targets, float (N, num_classes), the larger share is the right one."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return int((logits.argmax(1) == labels).sum())


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model's parameters, and take its batch-norm statistics as they are."""
    averages: list[Tensor] = list(ema.parameters())
    values: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(averages, values, 1 - decay)
    for average, value in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(value)


def write_log(path: Path, history: list[dict[str, float]]) -> None:
    """Write one CSV line an epoch."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


class StopRequest:
    """Whether a signal asked the run to stop."""

    requested = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop reads after each step; a second one acts at once."""
    stop = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _seed(seed: int, epoch: int, step: int = 0) -> int:
    """Give one generator seed for every (seed, epoch, step); step 0 is the epoch's data order."""
    return (seed * 1_000_003 + epoch) * 1_000_003 + step
