"""``python -m training train|evaluate|export|summary``: the command line of the training program."""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from service.checkpoint import CheckpointError
from service.images import InputSpec
from training.data import DataError, load_folder
from training.publish import publish
from training.recipes import find_recipe
from training.state import RunError
from training.train import Interrupted, RunOptions, train


def main(arguments: list[str] | None = None) -> int:
    """Run one command; give the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except Interrupted:
        sys.stderr.write("stopped; the same command continues the run\n")
        return 130
    except (DataError, RunError, CheckpointError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("train", help="train a recipe, or continue its run")
    command.set_defaults(run=_train)
    command.add_argument("--recipe", required=True)
    command.add_argument("--data", type=Path, required=True, help="folder with train/<class>/ and test/<class>/")
    command.add_argument("--out", type=Path, help="run folder; default runs/<recipe>-<date>")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--deterministic", action="store_true")
    command.add_argument("--compile", action="store_true")
    command.add_argument("--name", default="resnet18", help="name of the model in the checkpoint")
    command.add_argument("--skip-unreadable", action="store_true")
    command.add_argument("--publish", type=Path, help="copy the finished checkpoint here, as a running service watches for it")
    return parser


def _train(options: argparse.Namespace) -> int:
    recipe = find_recipe(options.recipe)
    spec = InputSpec()
    train_data = load_folder(options.data / "train", spec, skip_unreadable=options.skip_unreadable)
    test_data = load_folder(options.data / "test", spec, skip_unreadable=options.skip_unreadable)
    out = options.out or Path("runs") / f"{recipe.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    run = RunOptions(
        out, options.seed, torch.device(options.device), options.deterministic, options.compile, options.name, spec
    )
    path = train(recipe, train_data, test_data, run)
    sys.stdout.write(f"{path}\n")
    if options.publish is not None:
        sys.stdout.write(f"published version {publish(path, options.publish)} as {options.publish}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
