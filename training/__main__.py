"""``python -m training train|calibrate|evaluate|export|summary``: the command line of the training program.

Exit status: 0, 2 for anything the user can put right, 130 after Ctrl-C. Each command imports what it needs, so that none waits
for the others' libraries.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from service.model.architectures import MODELS
from service.model.atomic_file import WriteError
from service.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from service.model.images import InputSpec
from service.runtime.runner import RunnerError, RunnerOptions
from service.settings import choices
from training.data.dataset import Dataset, Source
from training.errors import DataError, Interrupted, TrainingError
from training.recipes import LEAST_SIZE, RECIPES, Recipe, find_recipe
from training.run.device import find_device

_DOWNLOAD = "cifar10"
_SEED_LIMIT = 2**20
_UNKNOWN = "images of other things, at any depth, to measure typicality on"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("service").setLevel(logging.WARNING)  # its lines are for who operates a service
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (Interrupted, KeyboardInterrupt) as stopped:
        sys.stderr.write(f"{str(stopped) or 'stopped'}\n")
        return 130
    except (TrainingError, CheckpointError, WriteError, RunnerError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train, measure and export an image classifier.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("train", help="train a recipe, or continue its run")
    command.set_defaults(run=_train)
    command.add_argument(
        "--recipe",
        help=f"one of {', '.join(RECIPES)}; default, and where it is empty: chosen for the data, with its first weights",
    )
    _add_data(command)
    command.add_argument("--out", type=Path, help="run folder; default runs/<recipe>, or without --recipe runs/<data>")
    command.add_argument("--seed", type=int, default=0, help="of the weights, the order of images and their augmentation")
    command.add_argument("--epochs", type=int, help="instead of the recipe's; without it, few images get more epochs")
    command.add_argument("--learning-rate", type=float, help="peak rate instead of the recipe's, for its batch size")
    command.add_argument("--batch-size", type=int, help="images in a step instead of the recipe's")
    command.add_argument("--patience", type=int, help="stop after so many epochs without a better one; keep the best one")
    command.add_argument("--no-balance", action="store_true", help="draw images as they are, however uneven the classes are")
    command.add_argument(
        "--size", type=int, help="side in pixels of the network's input, 16 or more (32, or the initial checkpoint's)"
    )
    command.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="begin with the weights of this one, of any classes, rather than with random ones; or 'imagenet': with"
        " torchvision's ResNet-18; or a .pth or .safetensors state dict of that",
    )
    _add_device(command)
    command.add_argument("--deterministic", action="store_true", help="bit-equal runs on a GPU too, where that is slower")
    command.add_argument(
        "--teacher", type=Path, metavar="FILE", help="checkpoint that a distilling recipe learns from; default: it trains one"
    )
    command.add_argument("--name", help="name of the model; default the run folder's")
    command.add_argument("--publish", type=Path, metavar="FILE", help="copy the result over the file that a service watches")

    command = commands.add_parser("calibrate", help="measure a checkpoint of train once more: calibration, int8, test, report")
    command.set_defaults(run=_calibrate)
    command.add_argument("checkpoint", type=Path, help="rewritten in place, its report beside it")
    _add_data(command)
    _add_device(command)
    command.add_argument("--unknown", type=Path, metavar="DIR", help=_UNKNOWN)

    command = commands.add_parser("evaluate", help="measure any checkpoint on any images")
    command.set_defaults(run=_evaluate)
    command.add_argument("checkpoint", type=Path)
    _add_data(command)
    command.add_argument(
        "--part",
        choices=("test", "train", "all"),
        help="of the data; default: test/; of a folder without one, what the training held out of it; else all of it",
    )
    command.add_argument("--url", help="ask the service at this address instead of a runtime in this process")
    command.add_argument("--api-key", default="", help="of the service at --url")
    command.add_argument("--precision", nargs="+", default=["auto"], choices=choices("precision"), help="side by side")
    command.add_argument("--runtime", default="auto", choices=choices("runtime"))
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--unknown", type=Path, metavar="DIR", help=_UNKNOWN)
    command.add_argument("--centre", type=int, metavar="PIXELS", help="show this part of the side only, scaled up")
    command.add_argument("--tta", action="store_true", help="also average each image with its mirror image")
    command.add_argument("--json", action="store_true", help="print JSON, not a table")

    command = commands.add_parser("export", help="write ONNX, or a folder for the Hugging Face Hub")
    command.set_defaults(run=_export)
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--onnx", type=Path, metavar="FILE", help="write ONNX here, checked in ONNX Runtime")
    command.add_argument("--hub-dir", type=Path, metavar="DIR", help="lay out model.safetensors, config.json, README.md here")

    command = commands.add_parser("summary", help="print the layer table")
    command.set_defaults(run=_summary)
    command.add_argument("checkpoint", type=Path, nargs="?", help="default: the architecture, untrained")
    command.add_argument("--architecture", default="resnet18", choices=MODELS)
    return parser


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help=f"folder with <class>/, or with train/<class>/ and test/ or val/ or both; or {_DOWNLOAD}, which is downloaded",
    )
    command.add_argument("--download-dir", type=Path, default=Path("data"), help=f"where --data {_DOWNLOAD} is kept (data)")
    command.add_argument("--split-seed", type=int, default=0, help="of the test images held out of a folder without test/")
    command.add_argument("--skip-unreadable", action="store_true", help="go on without files that cannot be decoded")
    command.add_argument("--data-note", default="", help="a remark on the data for the model card")


def _train(options: argparse.Namespace) -> int:
    from training.data.duplicates import warn_of_duplicates
    from training.distillation import prepare_teacher
    from training.output.publish import publish
    from training.step.parallel import open_parallel
    from training.train import RunOptions, train

    if not 0 <= options.seed < _SEED_LIMIT:
        raise ValueError(f"--seed must be 0 to {_SEED_LIMIT - 1}")
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS is repeatable only so
    with open_parallel(find_device(options.device)) as (parallel, device):
        if not parallel.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        with parallel.first_alone():
            recipe, initial, spec = _plan(options, device)
            source = _source(options, spec)
            if parallel.is_first:
                warn_of_duplicates(source)
        out = options.out or Path("runs") / (options.recipe or Path(options.data).resolve().name)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", options.name or out.resolve().name).strip("-._") or recipe.name
        run = RunOptions(out, options.seed, device, options.deterministic, name, spec, options.data_note)
        teacher = None
        if recipe.distillation is not None:
            teacher = prepare_teacher(recipe.distillation, source, run, parallel, options.teacher)
        path = train(recipe, source, run, parallel, teacher, initial)
        if parallel.is_first:
            sys.stdout.write(f"{path}\n")
            _log_next_steps(path, options)
            if options.publish is not None:
                sys.stdout.write(f"published version {publish(path, options.publish)} as {options.publish}\n")
    return 0


def _plan(options: argparse.Namespace, device: torch.device) -> tuple[Recipe, Checkpoint | None, InputSpec]:
    """Return the recipe, the first weights and the network's input: as named, or chosen for the data."""
    from training.choice import choose, load_chosen
    from training.data.survey import CIFAR10, survey
    from training.step.initial_weights import load_initial

    name, size = options.recipe, options.size
    if not name:
        data = CIFAR10 if options.data == _DOWNLOAD else survey(Path(options.data))
        choice = choose(data, options.initial_checkpoint, on_gpu=device.type == "cuda")
        logging.getLogger(__name__).info("%s", choice)
        name = choice.recipe
        initial, chosen_size = load_chosen(choice)
        size = size or chosen_size
    else:
        initial = None if options.initial_checkpoint is None else load_initial(options.initial_checkpoint)
    recipe = _with_overrides(find_recipe(name), options)
    if options.teacher is not None and recipe.distillation is None:
        raise ValueError(f"recipe {recipe.name} has no use for --teacher; leave it out, or take recipe best")
    if recipe.head_share and initial is None:
        raise ValueError(f"recipe {recipe.name} needs trained weights; add --initial-checkpoint imagenet or a file")
    spec = MODELS[recipe.architecture].input
    if initial is not None:
        spec = initial.metadata.input
        if initial.metadata.architecture != recipe.architecture:
            recipe = replace(recipe, architecture=initial.metadata.architecture, model=initial.metadata.config)
    return recipe, initial, spec if size is None else replace(spec, size=size)


def _with_overrides(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Return ``recipe`` with the numbers that the command line gives; raise ValueError for one that is too low."""
    if options.size is not None and options.size < LEAST_SIZE:
        raise ValueError(
            f"--size must be at least {LEAST_SIZE}, not {options.size}: the network halves its input several times"
        )
    for name in ("epochs", "learning_rate", "batch_size", "patience"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if options.epochs:
        recipe = replace(recipe, epochs=options.epochs, least_steps=0)
    if options.learning_rate:
        optimizer, factor = recipe.optimizer, options.learning_rate / recipe.optimizer.learning_rate
        optimizer = replace(
            optimizer, learning_rate=options.learning_rate, muon_learning_rate=optimizer.muon_learning_rate * factor
        )
        recipe = replace(recipe, optimizer=optimizer)
    return replace(
        recipe,
        batch_size=options.batch_size or recipe.batch_size,
        patience=options.patience or recipe.patience,
        balance_above=0.0 if options.no_balance else recipe.balance_above,
    )


def _log_next_steps(path: Path, options: argparse.Namespace) -> None:
    checkpoint, data, python = shlex.quote(str(path)), shlex.quote(options.data), Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    program = f"{shlex.quote(str(python))} -m training"
    split = f" --split-seed {options.split_seed}" if options.split_seed else ""
    steps = (
        f"look at:  MODEL_CARD.md, confusion.png and mistakes.png in {shlex.quote(str(path.parent))}\n"
        f"serve:    SERVICE_CHECKPOINT={checkpoint} make serve\n"
        f"evaluate: {program} evaluate {checkpoint} --data {data} --part test{split}\n"
        f"export:   {program} export {checkpoint} --onnx model.onnx"
    )
    logging.getLogger(__name__).info("%s", steps)


def _calibrate(options: argparse.Namespace) -> int:
    from training.data.folder import load_unknown
    from training.output.finish import finish

    checkpoint = load_checkpoint(options.checkpoint)
    recipe, metadata = checkpoint.metadata.recipe, checkpoint.metadata
    if not {"seed", "validation_images"} <= recipe.keys():
        raise ValueError(f"{options.checkpoint} was not made by train: it does not say which images were held out")
    device, source = find_device(options.device), _source(options, metadata.input)
    if source.train.class_names != metadata.class_names:
        raise DataError(f"the classes of {options.data} are not the checkpoint's, {', '.join(metadata.class_names)}")
    if recipe.get("data_digest", source.digest()) != source.digest():
        raise DataError(
            f"the files in {options.data} or their split have changed since the run, so images that were trained on would be"
            " tested with; give the folder and --split-seed of the run, or measure with evaluate"
        )
    kept, validation = source.divided(recipe["validation_images"], recipe["seed"])
    note = options.data_note or metadata.metrics.get("data_note", "")
    unknown = options.unknown and load_unknown(options.unknown, metadata)
    finish(options.checkpoint, kept.to(device), validation.to(device), source.test.to(device), note, unknown)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from training.data.folder import load_unknown
    from training.evaluation.evaluate import as_dict, as_table, evaluate, evaluate_runners
    from training.evaluation.http_predictor import HttpPredictor
    from training.evaluation.unknown import other_images

    checkpoint = load_checkpoint(options.checkpoint)
    data, which = _part(options, checkpoint)
    data = data.centred(options.centre) if options.centre else data
    others = other_images(data, load_unknown(options.unknown, checkpoint.metadata)) if options.unknown else {}
    measure = partial(evaluate, checkpoint, data, tta=options.tta, others=others)
    if options.url:
        evaluations = [measure(HttpPredictor(options.url, checkpoint, options.api_key))]
    else:
        runner = RunnerOptions(runtime=options.runtime, device=options.device)
        evaluations = evaluate_runners(checkpoint, options.precision, runner, measure)
    if options.json:
        sys.stdout.write(json.dumps([as_dict(evaluation) for evaluation in evaluations]) + "\n")
        return 0
    sys.stdout.write(f"{checkpoint.metadata.name} version {checkpoint.version} on {len(data)} images, {which}\n\n")
    sys.stdout.write(as_table(evaluations) + "\n")
    return 0


def _export(options: argparse.Namespace) -> int:
    from training.output.export import export_onnx
    from training.output.hub import write_hub_folder

    if options.onnx is None and options.hub_dir is None:
        raise ValueError("nothing to export; give --onnx FILE, --hub-dir DIR, or both")
    checkpoint = load_checkpoint(options.checkpoint)
    if options.onnx is not None:
        export_onnx(checkpoint, options.onnx)
    if options.hub_dir is not None:
        write_hub_folder(checkpoint, options.checkpoint, options.hub_dir)
    return 0


def _summary(options: argparse.Namespace) -> int:
    from training.output.summary import summary_of_architecture, summary_of_checkpoint

    if options.checkpoint is not None:
        table = summary_of_checkpoint(load_checkpoint(options.checkpoint))
    else:
        table = summary_of_architecture(options.architecture)
    sys.stdout.write(table + "\n")
    return 0


def _source(options: argparse.Namespace, spec: InputSpec) -> Source:
    """Return the data that ``--data`` names, divided into train and test."""
    if options.data == _DOWNLOAD:
        from training.data.cifar10 import load_cifar10

        return load_cifar10(options.download_dir, spec)
    from training.data.folder import load_source

    return load_source(Path(options.data), spec, skip_unreadable=options.skip_unreadable, split_seed=options.split_seed)


def _part(options: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Dataset, str]:
    """Return the images to evaluate on, and what they are."""
    from training.data.part import load_part

    names, part = checkpoint.metadata.class_names, options.part
    if options.data != _DOWNLOAD:
        return load_part(Path(options.data), part, checkpoint.metadata, options.split_seed, options.skip_unreadable)
    if part == "all":
        raise ValueError("give --part test or --part train; --part all is for a single folder of classes")
    source, part = _source(options, checkpoint.metadata.input), part or "test"
    if source.train.class_names != names:
        raise DataError(f"the classes {', '.join(source.train.class_names)} are not the checkpoint's, {', '.join(names)}")
    return {"train": source.train, "test": source.test}[part], f"the {part} part of {options.data}"


if __name__ == "__main__":
    sys.exit(main())
