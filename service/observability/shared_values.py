"""What the processes of a service share: one block of memory with a row for each of them.

A row belongs to a place (supervisor, engine, worker 3) and not to a process id. It holds facts, which are forgotten when the
process ends, and numbers, on which the next process in that place counts on, so a sum over rows never falls.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray


class Facts(ctypes.Structure):
    """What is true of one process while it runs; written by that process alone, each field in one store."""

    process_id: int
    heartbeats: int
    ready: bool
    draining: bool
    engine_gave_up: bool
    queue_full_for_s: int
    device_used_bytes: float
    device_total_bytes: float
    device_utilization: float
    _fields_ = (
        ("process_id", ctypes.c_int64),
        ("heartbeats", ctypes.c_int64),  # grows while its event loop runs
        ("ready", ctypes.c_bool),  # of a worker: a prediction would be answered
        ("draining", ctypes.c_bool),  # of the supervisor: the service is stopping
        ("engine_gave_up", ctypes.c_bool),  # of the supervisor: the engine died so often that the orchestrator should act
        ("queue_full_for_s", ctypes.c_int64),  # of the engine: when to retry, in whole seconds; 0 while there is room
        ("device_used_bytes", ctypes.c_double),  # of the engine, like the next two; 0 where there is no GPU
        ("device_total_bytes", ctypes.c_double),
        ("device_utilization", ctypes.c_double),
    )


_FACTS_BYTES = ctypes.sizeof(Facts)


class SharedValues:
    """Facts and ``columns`` float64 numbers for each of ``rows`` processes, all 0 at first; forked processes share it."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self._row_bytes = _FACTS_BYTES + 8 * columns
        self._block = mmap.mmap(-1, rows * self._row_bytes)

    def facts(self, index: int) -> Facts:
        """Return the facts of the process of row ``index``, to read and, in that process, to write."""
        return Facts.from_buffer(self._block, index * self._row_bytes)

    def row(self, index: int) -> memoryview[float]:
        """Return the numbers of row ``index``: a memoryview of float64, twice as fast to write as an array."""
        start = index * self._row_bytes
        return memoryview(self._block)[start + _FACTS_BYTES : start + self._row_bytes].cast("d")

    def table(self) -> NDArray[np.float64]:
        """Return all numbers as they are now, float64 (rows, columns), without copying them."""
        return np.frombuffer(self._block, np.float64).reshape(self.rows, -1)[:, _FACTS_BYTES // 8 :]

    def forget(self, index: int) -> None:
        """Zero the facts of a process that has ended."""
        ctypes.memset(ctypes.addressof(self.facts(index)), 0, _FACTS_BYTES)
