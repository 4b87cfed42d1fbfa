"""The decision on the model, as a later engine finds it."""

from __future__ import annotations

import pytest

from service.engine.model_files import Decision, ModelFiles

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # they are open as long as a service runs


def test_the_last_decision_is_found_however_long_the_one_before_was() -> None:
    """Before the first one no model is there; long refusals and lists are cut, the newest rejections stay."""
    files = ModelFiles()
    assert files.decision() == Decision()
    many = tuple(f"{number:012d}" for number in range(5_000))
    files.decide(Decision((1, 2), many, "\U0001f408" * 100_000))
    assert files.decision().rejected == Decision(rejected=many + many).rejected == many[-1_000:]
    last = Decision((2,), ("2" * 12,), "it is worse")
    files.decide(last)
    assert files.decision() == last
