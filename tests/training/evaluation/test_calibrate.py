"""Scores that mean what they say, the measure of how far they do, and the ranges for int8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from service.model.checkpoint import Calibration, Checkpoint
from service.model.classifier import calibrated
from service.model.images import InputSpec
from service.model.network import model_from_checkpoint
from training.data.augment import normalise
from training.evaluation.calibrate import activation_ranges, expected_calibration_error, fit_calibration, predict_logits


def sampled(scale: float, count: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from a softmax, and its logits times ``scale``: a model that is too sure by just that factor."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 10, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    return logits * scale, labels


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_model_too_sure(scale: float) -> None:
    """Of logits that are too large by a factor, the temperature is that factor, within sampling."""
    logits, labels = sampled(scale)
    calibration = fit_calibration(logits, labels)
    assert calibration.temperature == pytest.approx(scale, rel=0.03)
    assert calibration.cubic == 0, "nothing is left for it to explain"


def smoothed(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from a softmax, and logits whose distances to the largest are the cube roots of its own.

    So does label smoothing: sure images and very sure ones are left at nearly one distance.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 10, generator=generator) * 6
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    return -((logits.amax(1, keepdim=True) - logits) ** (1 / 3)), labels


def test_the_cubic_term_undoes_what_label_smoothing_did_to_the_distances() -> None:
    """On images that it was not fitted on, the curve leaves little more than sampling noise, and a temperature far more."""
    logits, labels = smoothed(5000)
    calibration = fit_calibration(logits, labels)
    assert calibration.cubic == pytest.approx(1, rel=0.1)
    logits, labels = smoothed(20_000, seed=1)
    assert expected_calibration_error(calibrated(logits, calibration).softmax(1), labels) < 0.01
    best = min(
        expected_calibration_error((logits / temperature).softmax(1), labels) for temperature in torch.logspace(-2, 1, 100)
    )
    assert best > 0.02, "whatever the temperature"


@pytest.mark.parametrize("calibration", [Calibration(temperature=0.7), Calibration(temperature=3.0, cubic=0.1)])
def test_calibration_keeps_the_order_of_the_classes(calibration: Calibration) -> None:
    """The curve rises, so every image keeps its label and its top 5."""
    logits = torch.randn(5000, 10, generator=torch.Generator().manual_seed(0))
    scores = calibrated(logits, calibration).softmax(1)
    assert torch.equal(scores.argsort(1), logits.argsort(1))


@pytest.mark.parametrize("wrong", [0, 2, 6])
def test_a_few_answers_change_the_scores_by_little(wrong: int) -> None:
    """Whether six images are all right, some or none of them, the temperature stays where those of networks lie."""
    logits, labels = torch.eye(3).repeat(2, 1) * 3, torch.arange(3).repeat(2)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    calibration = fit_calibration(logits, labels)
    assert calibration.cubic == 0
    assert 0.4 < calibration.temperature < 3
    assert (calibration.temperature < 1) == (wrong == 0)


@pytest.mark.parametrize("count", [6, 30])
def test_a_calibrated_model_is_not_spoilt_by_few_images(count: int) -> None:
    """Of a model whose scores mean what they say, calibration on a handful of images leaves that nearly so, on average."""
    logits, labels = sampled(1.0)
    parts = zip(logits.split(count)[:40], labels.split(count)[:40], strict=True)
    fitted = [fit_calibration(*part) for part in parts]
    errors = [expected_calibration_error(calibrated(logits, calibration).softmax(1), labels) for calibration in fitted]
    assert sum(errors) / len(errors) < 0.06


def test_many_answers_outweigh_what_is_expected_of_networks() -> None:
    """A temperature that hardly a network has is found all the same."""
    logits, labels = sampled(8.0, 1000)
    assert fit_calibration(logits, labels).temperature == pytest.approx(8, rel=0.15)


def test_the_calibration_error_is_that_of_the_definition() -> None:
    """Two bins by hand: 3 of 4 right at 0.9, 1 of 4 right at 0.5, so half of |0.9 - 0.75| and half of |0.5 - 0.25|."""
    probabilities = torch.tensor([[0.9, 0.1]] * 4 + [[0.5, 0.3]] * 4)
    labels = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.15 + 0.5 * 0.25, abs=1e-6)


def test_errors_of_one_bin_cancel_and_those_of_two_do_not() -> None:
    """Bins are 1/15 wide: 0.95 and 0.99 share the last, 0.85 lies two below."""
    same = torch.tensor([[0.99, 0.01], [0.95, 0.05]])
    apart = torch.tensor([[0.99, 0.01], [0.85, 0.15]])
    labels = torch.tensor([0, 1])
    assert expected_calibration_error(same, labels) == pytest.approx(abs(0.99 + 0.95 - 1) / 2)
    assert expected_calibration_error(apart, labels) == pytest.approx((0.01 + 0.85) / 2)


def test_a_calibrated_model_has_nearly_no_error_and_a_sure_one_much() -> None:
    """Sampled from its own scores a model's error is sampling noise; at three times the logits it is far from it."""
    logits, labels = sampled(1.0)
    assert expected_calibration_error(logits.softmax(1), labels) < 0.015
    assert expected_calibration_error((logits * 3).softmax(1), labels) > 0.1


def test_a_score_of_one_belongs_to_the_last_bin() -> None:
    """Scores at a bin's upper edge, 1.0 above all, are counted."""
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(1.0)


def test_the_ranges_are_the_largest_outputs_of_every_relu(checkpoint: Checkpoint, sample_images: NDArray[np.uint8]) -> None:
    """Every ReLU has its range under its own name."""
    model = model_from_checkpoint(checkpoint)
    images = torch.from_numpy(sample_images)
    maxima = activation_ranges(model, images, InputSpec())
    relus = {name for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
    assert maxima.keys() == relus
    assert all(value > 0 for value in maxima.values())
    with torch.inference_mode():
        stem = normalise(images, InputSpec())
        for module in model.get_submodule("stem").children():
            stem = module(stem)
    assert maxima["stem.2"] == pytest.approx(stem.max().item(), rel=1e-5)


def test_nothing_is_left_on_a_model_that_was_measured(checkpoint: Checkpoint, sample_images: NDArray[np.uint8]) -> None:
    """No hook stays, and a model in training mode is in training mode again."""
    model = model_from_checkpoint(checkpoint).train()
    activation_ranges(model, torch.from_numpy(sample_images[:4]), InputSpec())
    assert model.training
    assert not [name for name, module in model.named_modules() if module._forward_hooks]


def test_logits_do_not_depend_on_how_images_are_divided(checkpoint: Checkpoint, sample_images: NDArray[np.uint8]) -> None:
    """The last batch may be smaller, and one image's logits are its own."""
    model = model_from_checkpoint(checkpoint)
    images = torch.from_numpy(sample_images)
    whole = predict_logits(model, images, InputSpec())
    parts = torch.cat([predict_logits(model, part, InputSpec()) for part in images.split(7)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    assert whole.shape == (40, 10)
    assert math.isfinite(whole.sum().item())
