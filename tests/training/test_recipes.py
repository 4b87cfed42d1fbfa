"""What holds for every recipe there is; a new entry in ``RECIPES`` is tested by being there."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.model.images import InputSpec
from service.model.layers import Convolution, in_order
from tests.training.tiny_run import TINY
from training.data.dataset import Dataset
from training.recipes import RECIPES, Recipe, find_recipe
from training.step.network import build_model
from training.step.optimizer import learning_rate_factor, make_optimizers, set_learning_rates
from training.step.update import learn
from training.train import epoch_order, feed, size_at

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@every_recipe
def test_a_recipe_is_stored_as_json_that_names_every_setting(recipe: Recipe) -> None:
    """What the run folder and the checkpoint store can be read back, and tells recipes apart."""
    stored = json.dumps(asdict(recipe))
    assert json.loads(stored)["optimizer"]["learning_rate"] == recipe.optimizer.learning_rate
    assert [name for name, other in RECIPES.items() if json.dumps(asdict(other)) == stored] == [recipe.name]


@every_recipe
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(recipe: Recipe) -> None:
    """Over a run the rate rises once, reaches the peak, falls, and ends at zero; it is never zero before."""
    factors = [learning_rate_factor(recipe, progress / 1000) for progress in range(1001)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0, abs=1e-2)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors[:-1]) > 0
    assert factors[-1] == pytest.approx(0.0, abs=1e-9)


@every_recipe
def test_the_last_images_have_the_size_that_is_served(recipe: Recipe) -> None:
    """However the size of images grows, a run ends at the input's own, whatever that is."""
    for size in (32, 48, 64):
        assert size_at(recipe, 0.999, size) == size
        assert size_at(recipe, 0.0, size) <= size


@every_recipe
def test_a_step_changes_every_weight(recipe: Recipe) -> None:
    """One step of the recipe gives a finite loss and moves every parameter of the network."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Dataset(images, torch.arange(8), tuple("abcdefghij"))
    model = build_model(recipe.architecture, replace(recipe.config, num_classes=10))
    optimizers = make_optimizers(model, recipe.optimizer)
    set_learning_rates(optimizers, 1.0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    batch, targets = feed(data, torch.arange(8), recipe, InputSpec(), progress=0.0)
    loss, logits = learn(model, batch, targets, optimizers, recipe)
    assert loss.isfinite()
    assert logits.shape == (8, 10)
    # A bias before a batch norm has no effect: its gradient is rounding.
    no_effect = {f"{layer.name}.bias" for layer in in_order(model.layers) if isinstance(layer, Convolution) and layer.norm}
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still <= no_effect


@pytest.mark.parametrize(
    ("name", "epochs", "flip_p", "affine_p", "mixup", "cutmix", "smoothing"),
    [
        ("baseline", 10, 0.0, 0.0, False, False, 0.0),
        ("mixup", 30, 0.2, 0.2, True, False, 0.0),
        ("cutmix", 30, 0.2, 0.2, True, True, 0.0),
        ("aggressive", 30, 0.5, 0.5, True, True, 0.0),
        ("label_smoothing", 30, 0.2, 0.2, True, True, 0.1),
    ],
)
def test_the_published_recipes_are_as_published(
    name: str, epochs: int, flip_p: float, affine_p: float, mixup: bool, cutmix: bool, smoothing: float
) -> None:
    """What the published text states of a recipe is what ours does: 3,125 steps an epoch at batch 16, and its augmentation."""
    recipe = RECIPES[name]
    augmentation = recipe.augmentation
    assert (recipe.epochs, recipe.batch_size) == (epochs, 16)
    assert (augmentation.flip_p, augmentation.affine_p) == (flip_p, affine_p)
    assert (augmentation.mixup_alpha > 0, augmentation.cutmix_alpha > 0) == (mixup, cutmix)
    assert recipe.label_smoothing == (pytest.approx(smoothing) if smoothing else 0.0)
    assert augmentation.crop_padding == augmentation.erase_size == 0


def test_an_unknown_recipe_names_the_known_ones() -> None:
    """A typing error is answered with the names there are."""
    with pytest.raises(ValueError, match=f"unknown recipe 'bset'; known: {', '.join(RECIPES)}"):
        find_recipe("bset")


@every_recipe
def test_cifar10_is_trained_on_as_the_recipe_says(recipe: Recipe) -> None:
    """For 50,000 images of ten classes, fitting a recipe to the data changes nothing."""
    assert recipe.fitted_to(50_000, 10) == replace(recipe, model=replace(recipe.config, num_classes=10))


@given(images=st.integers(4, 100_000), classes=st.integers(2, 20), recipe=st.sampled_from([TINY, *RECIPES.values()]))
def test_any_number_of_images_makes_an_epoch(images: int, classes: int, recipe: Recipe) -> None:
    """Whatever the data, some images are held out, an epoch has a step, and no rate is above the recipe's."""
    images = max(images, 2 * classes)
    fitted = recipe.fitted_to(images, classes)
    kept = images - fitted.validation_images
    assert classes <= fitted.validation_images <= max(images / 10, classes)
    assert 1 <= fitted.batch_size <= min(recipe.batch_size, kept)
    assert kept // fitted.batch_size >= min(8, kept // 16, kept // recipe.batch_size or 8) or fitted.batch_size == kept
    assert fitted.optimizer.learning_rate <= recipe.optimizer.learning_rate
    assert fitted.config.num_classes == classes


@every_recipe
def test_a_hundred_batches_can_be_fed(recipe: Recipe) -> None:
    """Whatever is drawn for sixteen images, also nothing for any of them, a batch and its targets come out."""
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset(images, torch.arange(16) % 10, tuple("abcdefghij"))
    for seed in range(100):
        torch.manual_seed(seed)
        batch, targets = feed(data, torch.arange(16), recipe, InputSpec(), progress=0.99)
        assert batch.shape == (16, 3, 32, 32)
        assert len(targets) == 16
        assert batch.isfinite().all()


def test_few_images_are_trained_on_for_more_epochs() -> None:
    """Fifty images make three steps an epoch, and the run still has its least number of steps."""
    recipe = RECIPES["quick"]
    fitted = recipe.fitted_to(50, 2)
    steps = (50 - fitted.validation_images) // fitted.batch_size
    assert fitted.epochs * steps >= recipe.least_steps > (fitted.epochs - 1) * steps
    assert recipe.fitted_to(50_000, 10).epochs == recipe.epochs


@pytest.mark.parametrize(("rare", "balanced"), [(40, False), (39, True)])
def test_classes_are_drawn_equally_often_above_five_to_one(rare: int, balanced: bool) -> None:
    """Up to there every image comes once an epoch; above, half of the images drawn of two classes are of each."""
    labels = torch.tensor([0] * 200 + [1] * rare)
    data = Dataset(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, ("common", "rare"))
    order = epoch_order(data, 0, 0, RECIPES["quick"].balance_above)
    assert len(order) == len(labels)
    assert sorted(order.tolist()) == list(range(len(labels))) or balanced
    share = labels[order].double().mean().item()
    assert share == pytest.approx(0.5, abs=0.12) if balanced else share == pytest.approx(1 / 6)
    assert torch.equal(epoch_order(data, 0, 0, RECIPES["quick"].balance_above), order)


def test_a_fine_tuned_head_learns_before_the_rest() -> None:
    """Each of the two stages has a rise and a fall of the rate of its own, however many epochs there are."""
    recipe = RECIPES["finetune"].fitted_to(300, 4)
    head = sum(recipe.head_learns_alone(epoch) for epoch in range(recipe.epochs))
    assert 0 < head < recipe.epochs
    assert [recipe.head_learns_alone(epoch) for epoch in range(head + 2)] == [True] * head + [False] * 2
    assert recipe.stage_progress(head - 1e-9) == pytest.approx(1)
    assert recipe.stage_progress(head) == 0
    assert recipe.stage_progress(recipe.epochs) == 1
    assert not replace(recipe, epochs=1).head_learns_alone(0)
