"""The stored typicality: what is read back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from service.model.typicality import Typicality, take_typicality

FITTED = Typicality(
    centre=np.zeros(4, np.float32),
    directions=np.eye(3, 4, dtype=np.float32),
    weights=np.zeros((2, 4), np.float32),
    bias=np.zeros(2, np.float32),
    strangeness=np.arange(3, dtype=np.float32),
)


def test_what_is_stored_is_read_back() -> None:
    """The tensors are taken out of the weights, and nothing else is."""
    weights = FITTED.tensors() | {"head.weight": np.zeros(1, np.float32)}
    read = take_typicality(weights, classes=2)
    assert read is not None
    for name, value in read.tensors().items():
        np.testing.assert_array_equal(value, FITTED.tensors()[name])
    assert list(weights) == ["head.weight"]


def test_a_checkpoint_without_it_has_none() -> None:
    """Files of format version 1 load as before."""
    assert take_typicality({}, classes=2) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"typicality.bias": None}, "has no bias"),
        ({"typicality.weights": np.zeros((3, 4), np.float32)}, r"weights is \(3, 4\), expected \(2, 4\) for 2 classes"),
        ({"typicality.directions": np.zeros((), np.float32)}, "directions is"),
        ({"typicality.directions": np.zeros((3, 3), np.float32)}, "directions is"),
        ({"typicality.strangeness": np.zeros(0, np.float32)}, "strangeness is"),
        ({"typicality.strangeness": np.full(3, np.nan, np.float32)}, "strangeness must be finite float32"),
        ({"typicality.directions": np.eye(3, 4)}, "directions must be finite float32"),
    ],
)
def test_damaged_tensors_are_named(changes: dict[str, np.ndarray | None], message: str) -> None:
    """A missing tensor, another shape, other numbers: each is said."""
    weights = {name: value for name, value in (FITTED.tensors() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        take_typicality(weights, classes=2)
