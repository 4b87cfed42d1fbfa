"""One training run, read from top to bottom: data, network, epochs, checkpoint, report."""

from __future__ import annotations

import logging
import shlex
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.model.checkpoint import Calibration, Checkpoint, CheckpointMetadata
from service.model.images import InputSpec
from service.model.network import Network
from service.stop_signals import StopRequest, stop_signals
from training.data.augment import augment, mix
from training.data.dataset import Dataset, Source
from training.errors import DataError, Interrupted
from training.evaluation.calibrate import predict_logits
from training.evaluation.measurement import Predictions, measure
from training.output.finish import finish
from training.output.introduction import expected_seconds, imbalance_warning, introduction
from training.recipes import RECIPE_SIZE, Recipe
from training.run.device import device_name
from training.run.progress import EpochProgress
from training.run.revision import code_revision
from training.run.run_folder import Row, RunFolder
from training.run.state import TrainingState, load_state
from training.step.graphed_step import Step
from training.step.images_last import use_cpu_form
from training.step.initial_weights import begin_from, origin
from training.step.network import build_model, weights_of
from training.step.optimizer import learning_rate_factor, make_optimizers, set_learning_rates
from training.step.parallel import Parallel
from training.step.teacher import Teacher
from training.step.update import let_learn, make_step_function

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Everything about a run except its recipe and data; except for the seed it changes a result by rounding only.

    ``data_note`` is a remark on the data for the model card.
    """

    out: Path
    seed: int = 0
    device: torch.device = torch.device("cpu")
    deterministic: bool = False
    model_name: str = "resnet18"
    input: InputSpec = InputSpec()
    data_note: str = ""


@dataclass(frozen=True)
class Run:
    """What an epoch needs. All images lie on the device of ``options``."""

    recipe: Recipe
    options: RunOptions
    parallel: Parallel
    folder: RunFolder
    data: Dataset
    validation: Dataset
    model: Network
    optimizers: list[torch.optim.Optimizer]
    state: TrainingState

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.data) // self.recipe.batch_size


def train(
    recipe: Recipe,
    source: Source,
    options: RunOptions,
    parallel: Parallel | None = None,
    teacher_checkpoint: Checkpoint | None = None,
    initial_checkpoint: Checkpoint | None = None,
) -> Path:
    """Train to the end of the recipe, from where the run folder stands. Return the path of the final checkpoint.

    A recipe with distillation also needs its teacher (``training.distillation``). With ``initial_checkpoint`` the network
    starts from those weights (``step.initial_weights``). With several processes, each passes the same arguments but its own
    device. Raises Interrupted after SIGINT or SIGTERM, with the state saved, DataError when no image can be held out,
    and RunError when the run folder cannot be used or the initial checkpoint is of another network.
    """
    parallel = parallel or Parallel()
    device, class_names = options.device, source.train.class_names
    torch.use_deterministic_algorithms(options.deterministic)
    torch.backends.cudnn.benchmark = not options.deterministic
    recipe = recipe.fitted_to(len(source.train), len(class_names), has_validation=source.validation is not None)
    kept, validation = source.divided(recipe.validation_images, options.seed)
    if not len(validation):
        raise DataError("no image can be held out for validation; every class needs at least 2 training images")
    data, validation = kept.to(device), validation.to(device)

    torch.manual_seed(options.seed)
    model = build_model(recipe.architecture, recipe.config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if initial_checkpoint is not None:
        begin_from(model, initial_checkpoint, class_names)
    optimizers = make_optimizers(model, recipe.optimizer)
    if device.type == "cpu":
        use_cpu_form(model, recipe)
    teacher: Teacher | None = None
    if recipe.distillation is not None:
        assert teacher_checkpoint is not None, "training.distillation prepares it"
        teacher = Teacher(teacher_checkpoint, recipe.distillation, options.input, recipe.precision, device)

    recipe_dict = asdict(recipe) | {"seed": options.seed, "data_digest": source.digest()}
    if initial_checkpoint is not None:
        recipe_dict["initial_checkpoint"] = origin(initial_checkpoint)
    identity = {
        "recipe": asdict(recipe),
        "seed": options.seed,
        "classes": list(class_names),
        "set of images": [len(data), source.digest()],
        "input size": options.input.size,
        "teacher": None if teacher_checkpoint is None else teacher_checkpoint.version,
        "initial checkpoint": None if initial_checkpoint is None else initial_checkpoint.version,
    }
    folder = RunFolder(options.out)
    state = load_state(options.out, identity) or TrainingState(identity)
    if state.model:
        state.restore(model, optimizers)
        logger.info("continuing at epoch %d of %d, step %d", min(state.epoch + 1, recipe.epochs), recipe.epochs, state.step)
    elif parallel.is_first:
        folder.write_recipe(recipe_dict)

    if parallel.is_first and is_finished(recipe, state.history):
        logger.info("%s is finished; nothing to train", options.out)
    elif parallel.is_first:
        if warning := imbalance_warning(data, recipe):
            logger.warning("%s", warning)
        first_weights = "random" if initial_checkpoint is None else f"of {initial_checkpoint.metadata.name}"
        expected_s = expected_seconds(model, data, recipe, options.input) / parallel.world_size
        logger.info("%s", introduction(recipe, source, data, validation, options.input, first_weights, expected_s))
    run = Run(recipe, options, parallel, folder, data, validation, model, optimizers, state)
    learning: bool | None = None  # whether the head alone is what learns now
    # Under torchrun every process gets a terminal's Ctrl-C, and a second time from torchrun: that is not a second request.
    with stop_signals(signal.SIGINT, signal.SIGTERM, second="as before" if parallel.world_size == 1 else "ignored") as stop:
        while not parallel.any(parallel.is_first and is_finished(recipe, state.history)):
            if learning != (head_alone := recipe.head_learns_alone(state.epoch)):
                learning = head_alone
                let_learn(model, head_alone=head_alone)
                make_step = make_step_function(model, optimizers, recipe, device, parallel, teacher)
            train_epoch(run, make_step, stop)
            if parallel.is_first:
                save_epoch(run, recipe_dict)

    folder.close()
    if parallel.is_first:
        finish(folder.checkpoint, data, validation, source.test.to(device), options.data_note)
    parallel.wait()
    return folder.checkpoint


def train_epoch(run: Run, make_step: Step, stop: StopRequest) -> None:
    """Train from the next step of the state to the end of its epoch, and add the epoch to the state's history.

    Raises Interrupted after a step when ``stop`` is requested in any process; the state is saved before.
    """
    recipe, spec, state, parallel = run.recipe, run.options.input, run.state, run.parallel
    share = parallel.share(recipe.batch_size)
    order = epoch_order(run.data, run.options.seed, state.epoch, recipe.balance_above).to(run.options.device)
    shown = EpochProgress(state, recipe.epochs, run.steps, run.options.device, parallel)
    run.model.train()
    started = time.monotonic()
    for step in range(state.step, run.steps):
        torch.manual_seed(_seed(run.options.seed, state.epoch, step + 1))
        progress = (state.epoch + step / run.steps) / recipe.epochs
        set_learning_rates(run.optimizers, learning_rate_factor(recipe, recipe.stage_progress(state.epoch + step / run.steps)))
        index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        batch, targets = feed(run.data, index, recipe, spec, progress)
        batch, targets = batch[share], targets[share]
        loss, logits = make_step(batch, targets)
        state.step = step + 1
        stopping = parallel.any(stop.requested)
        shown.add(loss, logits, targets, show=stopping)
        if stopping:
            shown.close()
            state.elapsed_s += time.monotonic() - started
            if parallel.is_first:
                state.capture(run.model, run.optimizers)
                run.folder.save_state(state)
            parallel.wait()
            out = shlex.quote(str(run.options.out))
            raise Interrupted(f"stopped and saved; the same command goes on from there (RUN={out} of make, or --out {out})")

    row = {"epoch": state.epoch + 1, **shown.averages(), "learning_rate": run.optimizers[0].param_groups[0]["lr"]}
    if parallel.is_first:
        row |= validate(run.model, run.validation, recipe, spec)
    state.elapsed_s += time.monotonic() - started
    row["elapsed_s"] = round(state.elapsed_s, 1)
    shown.close(val_accuracy=row.get("val_accuracy", 0.0))
    state.end_epoch(row)


def save_epoch(run: Run, recipe_dict: dict[str, Any]) -> None:
    """Write the log, and when they are due, the checkpoint (with ``patience``, of the best epoch so far) and the state."""
    state, row = run.state, run.state.history[-1]
    run.folder.write_epoch(state.history)
    finished = is_finished(run.recipe, state.history)
    save_due = run.folder.is_save_due(finished=finished)
    # The checkpoint is written before the state: a run killed between the two writes this epoch's checkpoint once more.
    if best_epoch(state.history) == state.epoch if run.recipe.patience else save_due:
        metadata = CheckpointMetadata(
            name=run.options.model_name,
            architecture=run.recipe.architecture,
            config=run.recipe.config,
            class_names=run.data.class_names,
            input=run.options.input,
            recipe=recipe_dict,
            metrics={name: row[name] for name in ("train_accuracy", "val_accuracy", "elapsed_s")}
            | {"epochs_done": state.epoch, "train_device": device_name(run.options.device)},
            code_revision=code_revision(),
        )
        run.folder.save_checkpoint(weights_of(run.model), metadata)
    if save_due:
        if finished:
            state.model, state.optimizers = {}, []  # the checkpoint has the weights, and no step follows
        else:
            state.capture(run.model, run.optimizers)
        run.folder.save_state(state)


def feed(data: Dataset, index: Tensor, recipe: Recipe, spec: InputSpec, progress: float) -> tuple[Tensor, Tensor]:
    """Return the training batch of the images at ``index``, int64 (N,), when the share ``progress`` of the run is done.

    The batch is float32 (N, 3, side, side), normalised; its targets are int64 (N,), or float32 (N, num_classes) where
    images are mixed.
    """
    batch = augment(data.images[index], spec, recipe.augmentation, size_at(recipe, progress, spec.size))
    return mix(batch, data.labels[index], recipe.augmentation, len(data.class_names))


def validate(model: nn.Module, validation: Dataset, recipe: Recipe, spec: InputSpec) -> dict[str, float]:
    """Return loss, accuracy and balanced accuracy of ``model``, in the recipe's precision, on the held-out images."""
    logits = predict_logits(model, validation.images, spec, bf16=recipe.precision == "bf16")
    measured = measure(Predictions.of(logits.softmax(1)), validation.labels, validation.class_names, Calibration())
    loss = F.cross_entropy(logits, validation.labels).item()
    return {"val_loss": loss, "val_accuracy": measured.top1, "val_balanced_accuracy": measured.balanced}


def size_at(recipe: Recipe, progress: float, full_size: int) -> int:
    """Return the side in pixels that images are trained at when the share ``progress`` of the run is done."""
    size = full_size
    for start, side in recipe.sizes:
        if progress >= start:
            size = round(side * full_size / RECIPE_SIZE)
    return size


def epoch_order(data: Dataset, seed: int, epoch: int, balance_above: float = 0.0) -> Tensor:
    """Return the indices of an epoch's images, int64 (N,).

    Each image comes once; where the classes are too uneven (``Recipe.balance_above``), each is drawn with the same chance for
    every class, with replacement.
    """
    generator = torch.Generator().manual_seed(_seed(seed, epoch))
    if balance_above and data.imbalance > balance_above:
        labels = data.labels.cpu()
        weights = 1 / torch.bincount(labels).double()[labels]
        return torch.multinomial(weights, len(labels), replacement=True, generator=generator)
    return torch.randperm(len(data), generator=generator)


def best_epoch(history: list[Row]) -> int:
    """Return the epoch, from 1, with the highest balanced accuracy on validation, and of equals with the lowest loss."""
    return int(max(history, key=lambda row: (row["val_balanced_accuracy"], -row["val_loss"]))["epoch"])


def is_finished(recipe: Recipe, history: list[Row]) -> bool:
    """Whether all epochs are done, or ``recipe.patience`` of them since the best one."""
    done = len(history)
    return done >= recipe.epochs or bool(recipe.patience and history and done - best_epoch(history) >= recipe.patience)


def _seed(seed: int, epoch: int, step: int = 0) -> int:
    """Return one generator seed for every (seed, epoch, step); step 0 is the epoch's data order."""
    return (seed * 1_000_003 + epoch) * 1_000_003 + step
