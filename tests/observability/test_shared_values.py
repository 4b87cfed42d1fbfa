"""The table that processes count in."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest

from service.observability.shared_values import SharedValues


def count(values: SharedValues, row: int, column: int, times: int) -> None:
    """Add 1 that many times, in the process at hand."""
    cells = values.row(row)
    for _ in range(times):
        cells[column] += 1.0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_several_processes_count_at_once_is_all_there(method: str) -> None:
    """Rows do not disturb each other, and whoever holds the table sees every process's numbers."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    context: Any = multiprocessing.get_context(method)  # typeshed's base class has no Process
    values = SharedValues(3, 4, context)
    processes = [context.Process(target=count, args=(values, row, 2, 1000 + row)) for row in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert values.table()[:, 2].tolist() == [1000, 1001, 1002]
    assert values.table().sum() == 3003


def test_a_place_that_is_taken_over_counts_on() -> None:
    """A second process in the same row adds to what the first one left; only what is cleared begins anew."""
    values = SharedValues(2, 3)
    count(values, 1, 0, 5)
    count(values, 1, 2, 7)
    values.clear(1, [2])
    count(values, 1, 0, 1)
    count(values, 1, 2, 1)
    np.testing.assert_array_equal(values.table(), [[0, 0, 0], [6, 0, 1]])
