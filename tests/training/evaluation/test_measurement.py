"""Figures by hand."""

from __future__ import annotations

import pytest
import torch

from service.model.checkpoint import Calibration
from service.model.classifier import calibrated
from training.evaluation.calibrate import expected_calibration_error
from training.evaluation.measurement import Predictions, measure

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
    result = measure(Predictions.of(probabilities), torch.tensor([0, 0, 2, 2]), NAMES, Calibration())
    assert (result.images, result.top1, result.top5) == (4, 0.75, 0.75)
    assert result.per_class == {"a": 1.0, "c": 0.5}, "a class without images has no accuracy"
    assert result.confusion[0].tolist() == [2, 0, 0, 0, 0, 0, 0]
    assert result.confusion[2].tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert result.ece == pytest.approx((0.3 + 0.4 + 0.2 + 0.3) / 4, abs=1e-6)
    assert result.ece_before == pytest.approx(result.ece)


@pytest.mark.parametrize("cubic", [0.0, 1e-6, 0.003])
def test_the_error_before_calibration_is_that_of_the_plain_logits(cubic: float) -> None:
    """The calibration is undone from the scores alone, which is all that a service gives."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 7, generator=generator) * 4, torch.randint(7, (500,), generator=generator)
    calibration = Calibration(temperature=2.5, cubic=cubic)
    probabilities = calibrated(logits, calibration).softmax(1)
    result = measure(Predictions.of(probabilities), labels, NAMES, calibration)
    assert result.ece_before == pytest.approx(expected_calibration_error(logits.softmax(1), labels), abs=1e-5)
    assert result.ece == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-5)


def test_a_score_of_zero_does_not_spoil_the_figures() -> None:
    """Scores that were rounded to zero on the wire count as zero."""
    for calibration in (Calibration(temperature=1.7), Calibration(temperature=1.7, cubic=0.1)):
        result = measure(Predictions.of(torch.eye(2)), torch.tensor([0, 1]), ("a", "b"), calibration)
        assert result.ece_before == result.ece == 0.0


def test_equal_scores_are_ranked_as_the_service_ranks_them() -> None:
    """Of equals the first class comes first."""
    assert Predictions.of(torch.tensor([[0.2, 0.3, 0.2, 0.3]])).ranking.tolist() == [[1, 3, 0, 2]]
