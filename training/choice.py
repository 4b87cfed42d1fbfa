"""What a run is made of where nobody names a recipe: by the number of images, their size and their classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from service.model.checkpoint import Checkpoint
from service.settings import DEFAULT_CHECKPOINT
from training.data.survey import Survey
from training.errors import RunError
from training.step.initial_weights import IMAGENET, load_initial

logger = logging.getLogger(__name__)

_MANY_IMAGES = 50_000  # that need no weights of another network
_PHOTOGRAPH_SIDE = 64  # pixels of the shorter side
_FEW_CLASSES = 20
_MEDIUM_SIZE = 64


@dataclass(frozen=True)
class Choice:
    """Name of a recipe, ``--initial-checkpoint`` and ``--size`` (None: what the weights take), and why."""

    recipe: str
    initial: str | None
    size: int | None
    reason: str

    def __str__(self) -> str:
        weights = {None: "random weights", IMAGENET: "ImageNet weights"}.get(self.initial, f"the weights of {self.initial}")
        return f"recipe {self.recipe} from {weights}: {self.reason}"


def choose(data: Survey, initial: str | None = None, *, on_gpu: bool) -> Choice:
    """Choose for ``data``, and for the weights ``initial`` where they are given."""
    from_scratch = "best" if on_gpu else "cpu"
    what = f"{data.images:,} files of {data.classes} classes, the shorter side {data.side:.0f} pixels"
    photographs, many = data.side >= _PHOTOGRAPH_SIDE, data.images >= _MANY_IMAGES
    if initial is not None:
        return Choice("finetune", initial, None, "these weights were asked for")
    if many:
        return Choice(from_scratch, None, _MEDIUM_SIZE if photographs else None, f"{what}, are enough to do without others'")
    if photographs:
        return Choice("finetune", IMAGENET, None, f"{what}, are few photographs")
    if data.classes <= _FEW_CLASSES:
        return Choice("finetune", str(DEFAULT_CHECKPOINT), None, f"{what}, are few and small")
    return Choice(from_scratch, None, None, f"{what}, are small and of many classes")


def load_chosen(choice: Choice) -> tuple[Checkpoint | None, int | None]:
    """Load the chosen weights; return them and the chosen size. Without ImageNet's at hand, take the service's own."""
    if choice.initial is None:
        return None, choice.size
    try:
        return load_initial(choice.initial), choice.size
    except RunError as error:
        if choice.initial != IMAGENET:
            raise
        logger.warning(
            "%s, with another --out (RUN of make).\nGoing on with the weights of %s at %d pixels instead; expect a worse model",
            error,
            DEFAULT_CHECKPOINT.name,
            _MEDIUM_SIZE,
        )
    return load_initial(str(DEFAULT_CHECKPOINT)), _MEDIUM_SIZE
