"""The few facts that the supervisor and its children share, in one block of shared memory.

Owns: their names, and whether the supervisor still lives. Does not know: who acts on them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.context import BaseContext

_DRAINING, _ENGINE_GAVE_UP, _ENGINE_STARTS, _ENGINE_BEATS, _ENGINE_FULL_FOR_S, _FIRST_WORKER = range(6)

STOP_SIGNAL = signal.SIGUSR2  # from the supervisor to its children: drain and end


def supervisor_is_gone() -> bool:
    """Whether the process that started this one has ended, be it before this one ran its first line."""
    parent = multiprocessing.parent_process()
    return parent is not None and os.getppid() != parent.pid


class ProcessState:
    """Written by the supervisor, except for what the engine and the workers say of themselves; every write is atomic."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._values = context.RawArray("q", _FIRST_WORKER + workers)
        self.workers = workers

    @property
    def draining(self) -> bool:
        """Whether the service is on its way out."""
        return bool(self._values[_DRAINING])

    @draining.setter
    def draining(self, value: bool) -> None:
        self._values[_DRAINING] = value

    @property
    def engine_gave_up(self) -> bool:
        """Whether the engine died so often in a row that the orchestrator should take over."""
        return bool(self._values[_ENGINE_GAVE_UP])

    @engine_gave_up.setter
    def engine_gave_up(self, value: bool) -> None:
        self._values[_ENGINE_GAVE_UP] = value

    @property
    def engine_starts(self) -> int:
        """How often an engine was started."""
        return int(self._values[_ENGINE_STARTS])

    @engine_starts.setter
    def engine_starts(self, value: int) -> None:
        self._values[_ENGINE_STARTS] = value

    @property
    def engine_beats(self) -> int:
        """A number that grows for as long as the engine's event loop turns."""
        return int(self._values[_ENGINE_BEATS])

    def engine_beat(self) -> None:
        """Give a sign of life; for the engine."""
        self._values[_ENGINE_BEATS] += 1

    def engine_full_for_s(self) -> int:
        """Give the whole seconds after which to try the engine's full queue again; 0 while there is room."""
        return int(self._values[_ENGINE_FULL_FOR_S])

    def set_engine_full(self, retry_after_s: int) -> None:
        """Say that the queue is full and when to retry, or 0 for room; for the engine."""
        self._values[_ENGINE_FULL_FOR_S] = retry_after_s

    def set_worker_ready(self, worker: int, ready: bool) -> None:
        """Say whether worker number ``worker`` would answer a prediction."""
        self._values[_FIRST_WORKER + worker] = ready

    @property
    def all_workers_ready(self) -> bool:
        """Whether every worker would answer a prediction."""
        return all(self._values[_FIRST_WORKER : _FIRST_WORKER + self.workers])
