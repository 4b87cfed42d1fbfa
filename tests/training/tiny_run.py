"""The training program with one more recipe: a network small enough to be trained in a test, and everything turned on.

Run as ``python -m tests.training.tiny_run`` with the arguments of ``python -m training``.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import training.run.run_folder
from service.model.architectures import ModelConfig
from training.__main__ import main
from training.recipes import RECIPES, Augmentation, Optimizer, Recipe

TINY = Recipe(
    "tiny",
    epochs=6,
    batch_size=16,
    optimizer=Optimizer(learning_rate=0.05, muon_learning_rate=0.1),
    augmentation=Augmentation(flip_p=0.5, crop_padding=4, affine_p=0.2, erase_size=8, mixup_alpha=0.2, cutmix_alpha=1.0),
    label_smoothing=0.1,
    sizes=((0.0, 24), (0.5, 32)),
    least_steps=0,
    model=ModelConfig(stem_width=8, widths=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
)
# Without what makes rounding grow: bf16 keeps three digits, and Newton-Schulz amplifies them.
TINY_SMOOTH = replace(TINY, name="tiny_smooth", optimizer=Optimizer(learning_rate=0.005), precision="fp32", sizes=())

TINY_STAGED = replace(TINY_SMOOTH, name="tiny_staged", head_share=0.34)

if __name__ == "__main__":
    training.run.run_folder.SAVE_EVERY_S = 0.0  # its epochs are short
    RECIPES.update({recipe.name: recipe for recipe in (TINY, TINY_SMOOTH, TINY_STAGED)})
    sys.exit(main())
