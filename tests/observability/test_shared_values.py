"""The block of memory that the processes of a service share."""

from __future__ import annotations

import multiprocessing

import numpy as np

from service.observability.shared_values import SharedValues


def count(values: SharedValues, row: int, column: int, times: int) -> None:
    """Add 1 that many times, in the process at hand."""
    cells = values.row(row)
    for _ in range(times):
        cells[column] += 1.0
    values.facts(row).waiting_images = times


def test_what_several_processes_count_at_once_is_all_there() -> None:
    """Rows do not disturb each other, and whoever holds the block sees every process's numbers and facts."""
    context = multiprocessing.get_context("fork")
    values = SharedValues(3, 4)
    processes = [context.Process(target=count, args=(values, row, 2, 1000 + row)) for row in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert values.table()[:, 2].tolist() == [1000, 1001, 1002]
    assert values.table().sum() == 3003
    assert [values.facts(row).waiting_images for row in range(3)] == [1000, 1001, 1002]


def test_a_place_that_is_taken_over_counts_on() -> None:
    """A second process in the same row adds to the numbers that the first one left; its facts begin anew."""
    values = SharedValues(2, 3)
    count(values, 1, 0, 5)
    values.forget(1)
    assert values.facts(1).waiting_images == 0
    count(values, 1, 0, 1)
    np.testing.assert_array_equal(values.table(), [[0, 0, 0], [6, 0, 0]])
