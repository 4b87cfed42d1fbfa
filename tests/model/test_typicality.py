"""The stored typicality: what is read back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from service.model.typicality import Typicality, take_typicality

FITTED = Typicality(np.eye(4, dtype=np.float32), np.zeros((2, 4), np.float32), np.arange(3, dtype=np.float32))


def test_what_is_stored_is_read_back() -> None:
    """The tensors are taken out of the weights, and nothing else is."""
    weights = FITTED.tensors() | {"head.weight": np.zeros(1, np.float32)}
    read = take_typicality(weights, classes=2)
    assert read is not None
    for name in ("whitening", "means", "distances"):
        np.testing.assert_array_equal(getattr(read, name), getattr(FITTED, name))
    assert list(weights) == ["head.weight"]


def test_a_checkpoint_without_it_has_none() -> None:
    """Files of format version 1 load as before."""
    assert take_typicality({}, classes=2) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"typicality.means": None}, "has no means"),
        ({"typicality.means": np.zeros((3, 4), np.float32)}, "do not fit 2 classes"),
        ({"typicality.whitening": np.eye(3, dtype=np.float32)}, "do not fit 2 classes"),
        ({"typicality.distances": np.full(3, np.nan, np.float32)}, "distances must be finite float32"),
        ({"typicality.whitening": np.eye(4)}, "whitening must be finite float32"),
    ],
)
def test_damaged_tensors_are_named(changes: dict[str, np.ndarray | None], message: str) -> None:
    """A missing tensor, another shape, other numbers: each is said."""
    weights = {name: value for name, value in (FITTED.tensors() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        take_typicality(weights, classes=2)
