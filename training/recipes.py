"""Named training recipes; each is the whole truth of a run, apart from the data, the seed and the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from service.model.architectures import MODELS, ModelConfig

RECIPE_SIZE = 32  # the side in pixels that recipes' pixels refer to
LEAST_SIZE = 16  # the smallest side that is trained at
IMBALANCE = 5.0  # images of the largest class for one of the smallest, above which classes are drawn equally often
_LEAST_STEPS = 8  # of an epoch
_LEAST_BATCH = 16


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training batch; every amount of zero turns its step off.

    ``flip_p`` and ``affine_p`` are probabilities per image; ``crop_padding`` is the reflected border in pixels that a
    random crop is cut from; ``crop_area`` the least share of an image that a crop of another shape is scaled up from
    (Szegedy et al., "Going deeper with convolutions", 2015, section 6); ``erase_size`` the side in pixels of a square that is
    set to the mean colour (DeVries and Taylor, "Cutout", 2017); ``mixup_alpha`` and ``cutmix_alpha`` the Beta distributions
    of MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019), which a share ``mix_p`` of the batches get; with both, each of
    those takes one of the two by an even chance. Pixels are those of a 32-pixel image and grow with the input's size.
    """

    flip_p: float = 0.0
    crop_padding: int = 0
    crop_area: float = 0.0
    affine_p: float = 0.0
    affine_degrees: float = 15.0
    affine_translate: float = 0.1
    affine_scale: tuple[float, float] = (0.9, 1.1)
    erase_size: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_p: float = 1.0


@dataclass(frozen=True)
class Optimizer:
    """Nesterov SGD, alone or beside Muon for the filters of convolutions.

    ``learning_rate`` is SGD's peak for the mean loss of a batch; ``weight_decay`` leaves norms and biases alone.
    All layers but the last learn at ``body_rate`` of it.
    ``muon_learning_rate`` above 0 gives every filter above 1x1 that is followed by a norm to Muon (see
    ``training.step.optimizer``).
    """

    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    muon_learning_rate: float = 0.0
    muon_momentum: float = 0.6
    body_rate: float = 1.0


@dataclass(frozen=True)
class Distillation:
    """What the network learns from a teacher beside the labels (Hinton et al., "Distilling the Knowledge in a Network", 2015).

    ``teacher`` names the recipe that trains the teacher, on images ``scale`` times as large. Of the loss, ``weight`` is the
    divergence of the two networks' answers at ``temperature``, for the same augmented images (Beyer et al., "A good teacher is
    patient and consistent", 2022).
    """

    teacher: str
    scale: int = 2
    temperature: float = 4.0
    weight: float = 0.9


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    ``warmup`` is the share of all steps in which the learning rate rises linearly; it then falls to zero, along a cosine
    or a line. In the first ``head_share`` of the epochs the last layer learns alone, in a rise and fall of its own (Howard
    and Ruder, "Universal Language Model Fine-tuning", 2018, section 3.3). ``sizes`` lists (share of the run at which it
    begins, side in pixels) of progressive resizing (Howard, "Fast.ai DAWNBench", 2018), for a 32-pixel input; empty means the
    input's own size throughout. ``validation_images`` are held out of train for every choice. ``least_steps`` is a floor on
    the steps of a run: few images are trained on for more epochs. With ``patience`` above 0 the run ends after so many epochs
    without a better one, and keeps the best epoch's weights. Where the largest class has more than ``balance_above`` times
    the images of the smallest, every class is drawn equally often; 0 turns that off. Without a ``model``, the network is the
    usual one of its architecture.
    """

    name: str
    epochs: int
    batch_size: int
    optimizer: Optimizer
    augmentation: Augmentation = Augmentation()
    warmup: float = 0.2
    head_share: float = 0.0
    decay: Literal["cosine", "linear"] = "cosine"
    label_smoothing: float = 0.0
    sizes: tuple[tuple[float, int], ...] = ()
    precision: Literal["bf16", "fp32"] = "bf16"
    validation_images: int = 5000
    least_steps: int = 600
    patience: int = 0
    balance_above: float = IMBALANCE
    distillation: Distillation | None = None
    architecture: str = "resnet18"
    model: ModelConfig | None = None

    @property
    def config(self) -> ModelConfig:
        """Return the network's configuration."""
        return self.model or MODELS[self.architecture].config

    def head_learns_alone(self, epoch: int) -> bool:
        """Whether the last layer alone learns in ``epoch``, counted from 0."""
        return epoch < self._head_epochs

    def stage_progress(self, epochs: float) -> float:
        """Return the share, 0 to 1, that is done of the epochs of the head alone or of those of all layers."""
        head = self._head_epochs
        return epochs / head if epochs < head else (epochs - head) / (self.epochs - head)

    @property
    def _head_epochs(self) -> int:
        return min(round(self.head_share * self.epochs), self.epochs - 1)

    def fitted_to(self, images: int, num_classes: int, *, has_validation: bool = False) -> Recipe:
        """Return the recipe for a training set of that many images.

        At most a tenth of them is held out, and none where the data ``has_validation`` images of its own.

        The recipes' batches are for tens of thousands of images. Where an epoch would have fewer than ``_LEAST_STEPS``
        steps, the batch shrinks; SGD's rate shrinks with it (Goyal et al., 2017) and Muon's, a relative length, with its
        square root. A run of fewer than ``least_steps`` steps gets more epochs.
        """
        validation = 0 if has_validation else min(self.validation_images, max(images // 10, num_classes))
        kept = images - validation
        batch = self.batch_size
        if kept < _LEAST_STEPS * batch:
            batch = min(batch, kept, max(_LEAST_BATCH, kept // _LEAST_STEPS // _LEAST_BATCH * _LEAST_BATCH))
        factor = batch / self.batch_size
        optimizer = replace(
            self.optimizer,
            learning_rate=self.optimizer.learning_rate * factor,
            muon_learning_rate=self.optimizer.muon_learning_rate * factor**0.5,
        )
        model = replace(self.config, num_classes=num_classes)
        epochs = max(self.epochs, -(-self.least_steps // max(kept // max(batch, 1), 1)))
        return replace(self, epochs=epochs, batch_size=batch, validation_images=validation, optimizer=optimizer, model=model)


# Batch 16 is the published one. Its text is silent on the optimiser: the rate is 0.2 at batch 256, scaled linearly
# (Goyal et al., "Accurate, Large Minibatch SGD", 2017) and rounded down.
_BASELINE = Recipe("baseline", epochs=10, batch_size=16, optimizer=Optimizer(learning_rate=0.01))
_MIXUP = replace(_BASELINE, name="mixup", epochs=30, augmentation=Augmentation(flip_p=0.2, affine_p=0.2, mixup_alpha=0.2))
_CUTMIX = replace(_MIXUP, name="cutmix", augmentation=replace(_MIXUP.augmentation, cutmix_alpha=1.0))
_AGGRESSIVE = replace(_CUTMIX, name="aggressive", augmentation=replace(_CUTMIX.augmentation, flip_p=0.5, affine_p=0.5))
_LABEL_SMOOTHING = replace(_CUTMIX, name="label_smoothing", label_smoothing=0.1)

# The best in an hour or two of one CPU core. In trials at batch 256, in the second epoch, Muon was at 67 % on train and SGD
# at 57 %; its step took a fifth longer, at a batch of 512 a tenth. Twice the rate (0.1, cutout 10) was behind after 11
# epochs what this one reached in 4; all of these were without CutMix. 40 epochs without it, with label smoothing 0.1, ended
# at 93.16 % on validation, these 60 at 94.20 %. There is no average of weights: the rate falls to zero along a line.
_CPU = Recipe(
    "cpu",
    epochs=60,
    batch_size=512,
    optimizer=Optimizer(learning_rate=0.1, muon_learning_rate=0.05, muon_momentum=0.85),
    augmentation=Augmentation(flip_p=0.5, crop_padding=4, erase_size=8, cutmix_alpha=1.0, mix_p=0.5),
    warmup=0.05,
    decay="linear",
    sizes=((0.0, 24), (0.5, 32)),
)
# The same for a GPU, where epochs are cheap: many of them, and a teacher. 30 more epochs from a third of the rates, with
# the network's own answers (their mean over an image and its mirror image) for the teacher's, took it from 95.44 to
# 95.48 % on validation, which is no difference.
_BEST = replace(_CPU, name="best", epochs=150, sizes=(), distillation=Distillation("teacher"))
# The same layers over images of twice the side: four times the arithmetic. One with twice the filters (45 epochs, 2,000
# images held out) was at 96.30 % on validation, its student after 70 epochs at 94.80 %; 150 of these have not been run.
_TEACHER = replace(_CPU, name="teacher", epochs=80, sizes=((0.0, 24), (0.4, 32)), model=ModelConfig(stem_width=64))

# A usable model in about ten minutes of one CPU core: a short one-cycle run, its first part at 24 pixels.
_QUICK = Recipe(
    "quick",
    epochs=7,
    batch_size=128,
    optimizer=Optimizer(learning_rate=0.15),
    augmentation=Augmentation(flip_p=0.5, crop_padding=2),
    warmup=0.25,
    decay="linear",
    label_smoothing=0.1,
    sizes=((0.0, 24), (0.6, 32)),
)
# For few photographs, from the weights of a network that knows others.
_FINETUNE = Recipe(
    "finetune",
    epochs=5,
    batch_size=32,
    optimizer=Optimizer(learning_rate=0.05, weight_decay=1e-4, body_rate=0.2),
    augmentation=Augmentation(flip_p=0.5, crop_area=0.35),
    label_smoothing=0.1,
    least_steps=400,
    head_share=0.2,
)

_ALL = (_BASELINE, _MIXUP, _CUTMIX, _AGGRESSIVE, _LABEL_SMOOTHING, _CPU, _BEST, _TEACHER, _QUICK, _FINETUNE)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``; raise ValueError that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]
