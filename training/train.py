"""The training loop, read from top to bottom.

Owns: the order of things in a run: data, network, epochs, checkpoint. Does not know: the command line, HTTP.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.cpu import has_bf16_tiles
from service.model.checkpoint import Checkpoint, CheckpointMetadata, save_checkpoint
from service.model.images import InputSpec
from service.model.network import Network, build_model, config_dict, weights_of
from service.stop_signals import stop_signals
from training.data.augment import augment, mix
from training.data.dataset import Dataset, Source
from training.errors import DataError, Interrupted
from training.evaluation.calibrate import predict_logits
from training.finish import finish
from training.recipes import RECIPE_SIZE, Recipe
from training.run.progress import EpochProgress, count_correct
from training.run.revision import code_revision
from training.run.run_folder import RunFolder
from training.run.state import TrainingState, load_state, save_state
from training.step.graphed_step import GraphedStep, Step
from training.step.images_last import LEAST_BATCH, use_images_last
from training.step.initial_weights import begin_from, origin
from training.step.optimizer import learning_rate_factor, make_optimizers
from training.step.parallel import Parallel
from training.step.patch_conv import use_patch_convolutions
from training.step.teacher import Teacher

logger = logging.getLogger(__name__)

ARCHITECTURE = "resnet18"
_VALIDATION_BATCH = {"cpu": 500, "cuda": 2500}
SAVE_EVERY_S = 10.0  # at the end of an epoch; what a kill costs at most, beside the epoch it falls into


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside its recipe and data, and what should not change its result by more than rounding.

    ``data_note`` is a remark on the data for the model card.
    """

    out: Path
    seed: int = 0
    device: torch.device = torch.device("cpu")
    deterministic: bool = False
    compile: bool = False
    model_name: str = "resnet18"
    input: InputSpec = InputSpec()
    data_note: str = ""


def train(
    recipe: Recipe,
    source: Source,
    options: RunOptions,
    parallel: Parallel | None = None,
    teacher_checkpoint: Checkpoint | None = None,
    initial_checkpoint: Checkpoint | None = None,
) -> Path:
    """Train to the end of the recipe, from where the run folder stands; give the path of the final checkpoint.

    A recipe with distillation takes its teacher too (``training.distillation``). With ``initial_checkpoint`` the network begins
    with that one's weights (``step.initial_weights``). In several processes each calls this with the same arguments but
    its own device. Raises Interrupted after SIGINT or SIGTERM, with the state saved, and RunError when the run folder cannot
    be used or the initial checkpoint is of another network.
    """
    parallel = parallel or Parallel()
    device, spec = options.device, options.input
    torch.use_deterministic_algorithms(options.deterministic)
    torch.backends.cudnn.benchmark = not options.deterministic
    class_names = source.train.class_names
    recipe = recipe.fitted_to(len(source.train), len(class_names))
    kept, validation = source.train.split(recipe.validation_images, options.seed)
    if not len(validation):
        raise DataError("no image can be held out for validation; every class needs at least 2 training images")
    data, validation = kept.to(device), validation.to(device)
    steps = len(data) // recipe.batch_size
    share = parallel.share(recipe.batch_size)

    torch.manual_seed(options.seed)
    model = build_model(ARCHITECTURE, recipe.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if initial_checkpoint is not None:
        begin_from(model, initial_checkpoint, class_names)
    optimizers = make_optimizers(model, recipe.optimizer)
    if device.type == "cpu":
        use_cpu_form(model, recipe)
    teacher: Teacher | None = None
    if recipe.distillation is not None:
        assert teacher_checkpoint is not None, "training.distillation prepares it"
        teacher = Teacher(teacher_checkpoint, recipe.distillation, spec, recipe.precision, device)

    recipe_dict = recipe.to_dict() | {"seed": options.seed}
    if initial_checkpoint is not None:
        recipe_dict["initial_checkpoint"] = origin(initial_checkpoint)
    identity = {
        "recipe": json.loads(json.dumps(recipe.to_dict())),
        "seed": options.seed,
        "classes": list(class_names),
        "number of images": len(data),
        "input size": spec.size,
        "teacher": None if teacher_checkpoint is None else teacher_checkpoint.version,
        "initial checkpoint": None if initial_checkpoint is None else initial_checkpoint.version,
    }
    folder, revision = RunFolder(options.out), code_revision()
    state = load_state(options.out, identity) or TrainingState(identity)
    if state.model:
        model.load_state_dict(state.model)
        for optimizer, saved in zip(optimizers, state.optimizers, strict=True):
            optimizer.load_state_dict(saved)
        logger.info("continuing at epoch %d of %d, step %d", min(state.epoch + 1, recipe.epochs), recipe.epochs, state.step)
    elif parallel.is_first:
        folder.write_recipe(recipe_dict)

    def keep_state() -> None:
        state.model = model.state_dict()
        state.optimizers = [optimizer.state_dict() for optimizer in optimizers]
        if parallel.is_first:
            save_state(options.out, state)
        parallel.wait()

    forward: Callable[[Tensor], Tensor] = parallel.distribute(model, device)
    if options.compile:
        forward = torch.compile(forward, dynamic=False)
    make_step: Step = partial(learn, forward, optimizers=optimizers, recipe=recipe, teacher=teacher)
    if device.type == "cuda" and parallel.world_size == 1:
        make_step = GraphedStep(make_step, model, optimizers)
    saved_at = time.monotonic()
    # Under torchrun a second signal is no second wish: a terminal's Ctrl-C reaches every process, and torchrun passes it on.
    second: Literal["as before", "ignored"] = "as before" if parallel.world_size == 1 else "ignored"
    with stop_signals(signal.SIGINT, signal.SIGTERM, second=second) as stop:
        while state.epoch < recipe.epochs:
            order = epoch_order(len(data), options.seed, state.epoch).to(device)
            shown = EpochProgress(state, recipe.epochs, steps, device, parallel)
            model.train()
            started = time.monotonic()
            for step in range(state.step, steps):
                torch.manual_seed(_seed(options.seed, state.epoch, step + 1))
                progress = (state.epoch + step / steps) / recipe.epochs
                set_learning_rates(optimizers, learning_rate_factor(recipe, progress))

                index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
                batch, targets = feed(data, index, recipe, spec, progress)
                batch, targets = batch[share], targets[share]
                loss, logits = make_step(batch, targets)
                state.step = step + 1
                stopping = parallel.any(stop.requested)
                shown.add(loss, logits, targets, show=stopping)
                if stopping:
                    shown.close()
                    state.elapsed_s += time.monotonic() - started
                    keep_state()
                    raise Interrupted(f"stopped and saved; the same command with --out {options.out} continues the run")

            row = {"epoch": state.epoch + 1, **shown.averages(), "learning_rate": optimizers[0].param_groups[0]["lr"]}
            if parallel.is_first:
                row |= validate(model, validation, recipe, spec)
            state.elapsed_s += time.monotonic() - started
            row["elapsed_s"] = round(state.elapsed_s, 1)
            shown.close(val_accuracy=row.get("val_accuracy", 0.0))
            state.history.append(row)
            state.epoch, state.step = state.epoch + 1, 0
            state.loss_sum, state.correct, state.seen = 0.0, 0.0, 0.0
            if parallel.is_first:
                folder.write_epoch(state.history)
            if parallel.any(state.epoch < recipe.epochs and time.monotonic() - saved_at < SAVE_EVERY_S):
                continue
            if parallel.is_first:
                metadata = CheckpointMetadata(
                    name=options.model_name,
                    architecture=ARCHITECTURE,
                    config=config_dict(recipe.model),
                    class_names=class_names,
                    input=spec,
                    recipe=recipe_dict,
                    metrics={"epochs_done": state.epoch, "val_accuracy": row["val_accuracy"]},
                    code_revision=revision,
                )
                # Before the state: a run killed between the two writes this epoch's checkpoint once more.
                save_checkpoint(folder.checkpoint, weights_of(model), metadata)
            keep_state()
            saved_at = time.monotonic()

    folder.close()
    if parallel.is_first:
        finish(folder.checkpoint, data, validation, source.test.to(device), state.history, options.data_note)
    parallel.wait()
    return folder.checkpoint


def use_cpu_form(model: Network, recipe: Recipe) -> None:
    """Let ``model`` compute in the form that is fastest on this CPU; parameters and names stay."""
    if recipe.precision == "bf16" and recipe.batch_size >= LEAST_BATCH and has_bf16_tiles():
        use_images_last(model)
    else:
        use_patch_convolutions(model)


def feed(data: Dataset, index: Tensor, recipe: Recipe, spec: InputSpec, progress: float) -> tuple[Tensor, Tensor]:
    """Give the training form of the images at ``index``, int64 (N,), when the share ``progress`` of the run is done.

    The batch is float32 (N, 3, side, side), normalised; its targets are int64 (N,), or float32 (N, num_classes) where
    images are mixed.
    """
    batch = augment(data.images[index], spec, recipe.augmentation, size_at(recipe, progress, spec.size))
    return mix(batch, data.labels[index], recipe.augmentation, len(data.class_names))


def learn(
    forward: Callable[[Tensor], Tensor],
    batch: Tensor,
    targets: Tensor,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """Make one update from what ``feed`` gives; give the mean loss, float32 (), and the logits, float (N, num_classes)."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = forward(batch)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
    if teacher is not None:
        loss = teacher.loss(logits.float(), batch, hard=loss)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach(), logits.detach()


def validate(model: nn.Module, validation: Dataset, recipe: Recipe, spec: InputSpec) -> dict[str, float]:
    """Give loss and accuracy of ``model``, in eval mode and the recipe's precision, on the images that were held out."""
    batch_size = _VALIDATION_BATCH[validation.images.device.type]
    logits = predict_logits(model, validation.images, spec, bf16=recipe.precision == "bf16", batch_size=batch_size)
    correct = count_correct(logits, validation.labels)
    return {
        "val_loss": F.cross_entropy(logits, validation.labels).item(),
        "val_accuracy": correct.item() / len(validation),
    }


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to ``factor`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def size_at(recipe: Recipe, progress: float, full_size: int) -> int:
    """Give the side in pixels that images are trained at when the share ``progress`` of the run is done."""
    size = full_size
    for start, side in recipe.sizes:
        if progress >= start:
            size = round(side * full_size / RECIPE_SIZE)
    return size


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """Give the order in which an epoch takes its images, int64 (images,)."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(_seed(seed, epoch)))


def _seed(seed: int, epoch: int, step: int = 0) -> int:
    """Give one generator seed for every (seed, epoch, step); step 0 is the epoch's data order."""
    return (seed * 1_000_003 + epoch) * 1_000_003 + step
