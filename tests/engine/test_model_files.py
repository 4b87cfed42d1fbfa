"""The decision on the model, as a later engine finds it."""

from __future__ import annotations

import resource

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


def test_a_decision_needs_no_more_space() -> None:
    """Where no file may grow, as on a full disk, it is kept all the same."""
    files = ModelFiles()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        for number in range(1_000):
            files.decide(Decision((0, 1), refusal=f"{number:012d}" * 80))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.decision().refusal.startswith("000000000999")
