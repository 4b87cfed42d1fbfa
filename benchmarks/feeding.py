"""``python -m benchmarks.feeding``: the share of a training step that goes into gathering, augmenting and mixing its images.

Owns: timing the two halves of a step, as the loop calls them. Does not know: what is in either. Images are drawn by
chance: their pixels change no timing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from service.model.checkpoint import Checkpoint, CheckpointMetadata
from service.model.images import InputSpec
from service.model.network import build_model, config_dict, weights_of
from training.data.dataset import Dataset
from training.recipes import RECIPES, Distillation, Recipe, find_recipe
from training.run.device import device_name, find_device
from training.step.graphed_step import GraphedStep, Step
from training.step.optimizer import make_optimizers
from training.step.teacher import Teacher
from training.step.update import learn, use_cpu_form
from training.train import feed

T = TypeVar("T")

_IMAGES = 5000
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class StepTimes:
    """Medians over the steps: what ``feed`` took and what ``learn`` took, in milliseconds."""

    feed_ms: float
    learn_ms: float

    @property
    def share(self) -> float:
        """Feeding's part of the step, 0..1."""
        return self.feed_ms / (self.feed_ms + self.learn_ms)


def time_steps(recipe: Recipe, device: torch.device, steps: int) -> StepTimes:
    """Time steps in the last part of ``recipe``, at full size, on random images that lie on ``device``."""
    torch.manual_seed(0)
    spec = InputSpec()
    classes = recipe.model.num_classes
    images = torch.randint(0, 256, (_IMAGES, 3, spec.size, spec.size), dtype=torch.uint8)
    data = Dataset(images, torch.arange(_IMAGES) % classes, tuple(map(str, range(classes)))).to(device)
    model = build_model(recipe.architecture, recipe.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = make_optimizers(model, recipe.optimizer)
    teacher = None
    if recipe.distillation is not None:
        teacher = untrained_teacher(recipe.distillation, recipe.precision, spec, data.class_names, device)
    make_step: Step = partial(learn, model, optimizers=optimizers, recipe=recipe, teacher=teacher)
    if device.type == "cpu":
        use_cpu_form(model, recipe)
    else:
        make_step = GraphedStep(make_step, model, optimizers)
    fed, learnt = [], []
    for step in range(_WARM_UP_STEPS + steps):
        index = torch.randint(_IMAGES, (recipe.batch_size,)).to(device)
        (batch, targets), feed_ms = _timed(partial(feed, data, index, recipe, spec, progress=0.99), device)
        _, learn_ms = _timed(partial(make_step, batch, targets), device)
        if step >= _WARM_UP_STEPS:
            fed.append(feed_ms)
            learnt.append(learn_ms)
    return StepTimes(statistics.median(fed), statistics.median(learnt))


def untrained_teacher(
    distillation: Distillation, precision: str, spec: InputSpec, class_names: tuple[str, ...], device: torch.device
) -> Teacher:
    """Make a teacher that takes as long to answer as a trained one."""
    config = find_recipe(distillation.teacher).model
    metadata = CheckpointMetadata(
        name="untrained",
        architecture="resnet18",
        config=config_dict(config),
        class_names=class_names,
        input=replace(spec, size=spec.size * distillation.scale),
    )
    checkpoint = Checkpoint(weights_of(build_model("resnet18", config)), metadata, "0" * 64)
    return Teacher(checkpoint, distillation, spec, precision, device)


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, (time.perf_counter() - started) * 1000


def main(arguments: list[str] | None = None) -> int:
    """Print one line for each recipe, as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feeding", description=__doc__)
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES), help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each recipe")
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    print(f"{device_name(device)}, torch {torch.__version__}, medians of {options.steps} steps\n")
    print("| recipe | batch | feeding | learning | share of feeding |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in options.recipe:
        recipe = find_recipe(name)
        times = time_steps(recipe, device, options.steps)
        print(
            f"| `{name}` | {recipe.batch_size} | {times.feed_ms:.2f} ms | {times.learn_ms:.2f} ms"
            f" | {times.share * 100:.1f} % |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
