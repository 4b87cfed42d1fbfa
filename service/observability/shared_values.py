"""A table of numbers in shared memory: one row for each process, which alone writes it, and all of them read as one sum.

Owns: the memory. Does not know: what a column means.

A row belongs to a place (supervisor, engine, worker 3) and not to a process id: what is started again in that place counts
on where the last one stopped, so a sum over rows never falls and the table never grows.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from multiprocessing.context import BaseContext

import numpy as np
from numpy.typing import NDArray


class SharedValues:
    """float64 (rows, columns), all zero at first. Each write is atomic; a row is written from one thread of its process."""

    def __init__(self, rows: int, columns: int, context: BaseContext | None = None) -> None:
        self.rows = rows
        self.columns = columns
        self._block = (context or multiprocessing.get_context()).RawArray("d", rows * columns)

    def row(self, index: int) -> memoryview[float]:
        """Give row ``index`` to write: a memoryview of ``columns`` float64, twice as fast as the array itself."""
        cells = memoryview(self._block).cast("B").cast("d")
        return cells[index * self.columns : (index + 1) * self.columns]

    def table(self) -> NDArray[np.float64]:
        """Give the whole table as it is now, float64 (rows, columns), without copying it."""
        return np.frombuffer(self._block, np.float64).reshape(self.rows, self.columns)

    def clear(self, index: int, columns: Iterable[int]) -> None:
        """Zero these columns of a row whose process has ended."""
        row = self.row(index)
        for column in columns:
            row[column] = 0.0
