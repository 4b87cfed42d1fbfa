"""``python -m benchmarks.few_images``: what a run over few images gains by beginning with a trained network's weights.

A network is trained on all classes but a few; those few are then learnt from a handful of images each, once from random
weights and once from that network's, which has never seen an image of theirs. With ``--initial`` all classes of a folder are
learnt, from random weights and from that checkpoint's, each seed with a test set of its own. A run that was stopped
continues, one that is finished is only measured again.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from service.model.checkpoint import load_checkpoint
from training.data.dataset import Dataset, Source
from training.data.folder import load_source
from training.errors import DataError
from training.recipes import RECIPES, find_recipe
from training.run.device import find_device
from training.train import RunOptions, train

_FIGURES = ("test_accuracy", "test_balanced_accuracy", "test_ece_before", "test_ece")


def main() -> int:
    """Train every network that the table needs, print it, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_images", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--new", nargs="+", default=["bird", "horse", "truck"], help="the classes that are held back")
    parser.add_argument("--images", nargs="+", type=int, default=[20, 100], help="of each of them, for training")
    parser.add_argument("--recipes", nargs="+", default=["quick"], choices=sorted(RECIPES))
    parser.add_argument("--initial", type=Path, help="checkpoint that is begun with; no class is then held back")
    parser.add_argument("--steps", type=int, help="least steps of a run, instead of the recipe's")
    parser.add_argument("--first-recipe", default="quick", choices=sorted(RECIPES), help="of the network that is begun with")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/few-images"), help="where the runs are kept")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    first = RunOptions(options.out / "first", device=find_device(options.device), model_name="first")
    if options.initial is not None:
        initial = load_checkpoint(options.initial)
        first = replace(first, input=initial.metadata.input)
        sources = {seed: load_source(options.data, first.input, split_seed=seed) for seed in options.seeds}
    else:
        source = load_source(options.data, first.input)
        new = tuple(sorted(options.new))
        others = tuple(name for name in source.train.class_names if name not in new)
        initial = load_checkpoint(train(find_recipe(options.first_recipe), only_of_both(source, others), first))
        sources = dict.fromkeys(options.seeds, only_of_both(source, new))
    print("| images of a class | recipe | begun with | accuracy | balanced | calibration error of the logits | of the scores |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    beginnings = (("random", None), ("trained", initial))
    for count, name, (weights, beginning) in product(options.images, options.recipes, beginnings):
        recipe = find_recipe(name)
        recipe = replace(recipe, least_steps=options.steps or recipe.least_steps)
        measured = []
        for seed, source in sources.items():
            few = replace(source, train=at_most(source.train, count))
            folder = f"{count}-{name}-{weights}-{seed}"
            run = replace(first, out=options.out / folder, seed=seed, model_name=folder)
            measured.append(load_checkpoint(train(recipe, few, run, initial_checkpoint=beginning)).metadata.metrics)
        cells = [as_cell([metrics[key] for metrics in measured]) for key in _FIGURES]
        print(f"| {count} | `{name}` | {weights} weights | {' | '.join(cells)} |", flush=True)
    return 0


def as_cell(values: list[float]) -> str:
    """Give the mean of shares in per cent, and each of them."""
    return f"{statistics.mean(values):.1%} ({', '.join(f'{value:.1%}' for value in values)})"


def only_of_both(source: Source, class_names: tuple[str, ...]) -> Source:
    """Give train and test with these classes alone."""
    return Source(only(source.train, class_names), only(source.test, class_names))


def only(data: Dataset, class_names: tuple[str, ...]) -> Dataset:
    """Give the images of these classes, labelled by their places among them; raise DataError for a class that is not there."""
    if missing := [name for name in class_names if name not in data.class_names]:
        raise DataError(f"the data has no class {', '.join(missing)}; its classes are {', '.join(data.class_names)}")
    chosen = torch.tensor([data.class_names.index(name) for name in class_names])
    subset = data.subset(torch.isin(data.labels, chosen).nonzero().flatten())
    labels = (subset.labels[:, None] == chosen).int().argmax(1)
    return replace(subset, labels=labels, class_names=class_names)


def at_most(data: Dataset, count: int) -> Dataset:
    """Give the first ``count`` images of every class."""
    kept = [(data.labels == label).nonzero().flatten()[:count] for label in range(len(data.class_names))]
    return data.subset(torch.cat(kept).sort().values)


if __name__ == "__main__":
    sys.exit(main())
