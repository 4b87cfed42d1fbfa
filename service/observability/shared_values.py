"""One block of memory that all processes of a service share, with a row for each of them.

A row belongs to a role (supervisor, engine, worker 3), not to a process id. It holds facts, which are reset when the process
ends, and numbers, which the next process in that role continues from, so a sum over rows never falls.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Facts(ctypes.Structure):
    """The state of one process while it runs; written by that process alone, but for ``beat_at``; each field in one store."""

    process_id: int
    beat_at: float  # time.monotonic() of the last heartbeat of its event loop; the supervisor sets the first
    requests: int  # of a worker: those that are being answered
    ready: bool  # of a worker: a prediction would be answered; of the engine: it serves workers
    connections: int  # of a worker: open ones
    draining: bool  # of the supervisor: the service is stopping
    engine_gave_up: bool  # of the supervisor: the engine died so often that the orchestrator should act
    waiting_images: int  # of the engine, like all that follow: see service.engine.interface.Load
    running_images: int
    images_per_s: float
    device_used_bytes: float  # 0 where there is no GPU, like the next two
    device_total_bytes: float
    device_utilization: float  # NaN where it is not known


_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {"int": ctypes.c_int64, "bool": ctypes.c_bool, "float": ctypes.c_double}
Facts._fields_ = [(name, _TYPES[kind]) for name, kind in Facts.__annotations__.items()]
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
