"""Figures by hand."""

from __future__ import annotations

import pytest
import torch

from training.calibrate import expected_calibration_error
from training.measurement import Predictions, measure

NAMES = ("a", "b", "c", "d", "e", "f", "g")


def test_every_figure_is_that_of_its_definition() -> None:
    """Four images, two of class a and two of c: three right at once, all within five but one that is ranked last."""
    probabilities = torch.tensor(
        [
            [0.70, 0.10, 0.05, 0.05, 0.05, 0.03, 0.02],
            [0.60, 0.20, 0.05, 0.05, 0.05, 0.03, 0.02],
            [0.05, 0.05, 0.80, 0.04, 0.03, 0.02, 0.01],
            [0.30, 0.20, 0.02, 0.15, 0.14, 0.12, 0.07],
        ]
    )
    result = measure(Predictions.of(probabilities), torch.tensor([0, 0, 2, 2]), NAMES, temperature=1.0)
    assert (result.images, result.top1, result.top5) == (4, 0.75, 0.75)
    assert result.per_class == {"a": 1.0, "c": 0.5}, "a class without images has no accuracy"
    assert result.confusion[0].tolist() == [2, 0, 0, 0, 0, 0, 0]
    assert result.confusion[2].tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert result.ece == pytest.approx((0.3 + 0.4 + 0.2 + 0.3) / 4, abs=1e-6)
    assert result.ece_before == pytest.approx(result.ece)


def test_the_error_before_the_temperature_is_that_of_the_plain_logits() -> None:
    """The temperature is undone from the scores alone, which is all that a service gives."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 7, generator=generator) * 4, torch.randint(7, (500,), generator=generator)
    result = measure(Predictions.of((logits / 2.5).softmax(1)), labels, NAMES, temperature=2.5)
    assert result.ece_before == pytest.approx(expected_calibration_error(logits.softmax(1), labels), abs=1e-5)
    assert result.ece == pytest.approx(expected_calibration_error((logits / 2.5).softmax(1), labels), abs=1e-5)


def test_a_score_of_zero_does_not_spoil_the_figures() -> None:
    """Scores that were rounded to zero on the wire count as zero."""
    result = measure(Predictions.of(torch.tensor([[1.0, 0.0], [0.0, 1.0]])), torch.tensor([0, 1]), ("a", "b"), 1.7)
    assert result.ece_before == result.ece == 0.0


def test_equal_scores_are_ranked_as_the_service_ranks_them() -> None:
    """Of equals the first class comes first."""
    assert Predictions.of(torch.tensor([[0.2, 0.3, 0.2, 0.3]])).ranking.tolist() == [[1, 3, 0, 2]]
