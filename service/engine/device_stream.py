"""A stream of the device as the engine uses it: a batch is begun, and its end is told on the event loop.

Owns: the device's threads, looking at a device that works by itself, the halves of a failing batch. Does not know: queues,
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed
from service.runtime.runner import PolledRunner, Runner

logger = logging.getLogger(__name__)

Outcomes = list[NDArray[np.float32] | InferenceFailed]
_Run = Callable[[Runner, Sequence[NDArray[np.uint8]], int], Outcomes]


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a batch, in its order, and whether the device could do better; ``at`` is a ``time.monotonic()``."""

    outcomes: Outcomes
    device_failed: bool
    at: float


@dataclass(frozen=True, slots=True)
class Work:
    """One batch: arrays uint8 (n, 3, size, size) for ``runner``, or none to only ``check``.

    ``check`` raises unless the device answers a known image; it is asked where every part of the batch failed. ``end`` is
    called once, on the event loop.
    """

    runner: Runner
    parts: Sequence[NDArray[np.uint8]]
    check: Callable[[], None]
    end: Callable[[Ended], None]


class DeviceStream(ABC):
    """Takes one batch after the other; used on one event loop."""

    @abstractmethod
    def begin(self, work: Work) -> None:
        """Begin a batch; the one before has ended."""

    @abstractmethod
    def close(self) -> None:
        """Begin nothing more; what is begun may still end."""


def open_stream(runner: Runner, stream: int) -> DeviceStream:
    """Open number ``stream`` of ``runner``, and of the runners of its class that replace it."""
    return _PolledStream(stream) if isinstance(runner, PolledRunner) else _ThreadStream(stream)


class _ThreadStream(DeviceStream):
    """A thread that stays in the runner until a batch is done."""

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        threading.Thread(target=self._serve, name=f"device-{stream}", daemon=True).start()

    def begin(self, work: Work) -> None:
        self._work.put(work)

    def close(self) -> None:
        """Let the thread end; a hung one is left behind."""
        self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            _do(work, self._stream, self._loop, _run)


class _PolledStream(DeviceStream):
    """Begins a batch on the event loop, and looks at the device once in a turn of it.

    No thread is woken and none waits for the interpreter, which takes longer than a small batch. A turn costs processor time
    while a batch runs, as waiting for the device in a thread does. Checks and failures, which may take long, get a thread.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()

    def begin(self, work: Work) -> None:
        if not work.parts:
            self._do_in_thread(work, _run)
            return
        assert isinstance(work.runner, PolledRunner), "a model is replaced by one of the same runtime"
        try:
            work.runner.begin(work.parts, self._stream)
        except Exception:
            self._failed(work)
        else:
            self._loop.call_soon(self._look, work, work.runner)

    def close(self) -> None:
        pass

    def _look(self, work: Work, runner: PolledRunner) -> None:
        try:
            probabilities = runner.look(self._stream)
            outcomes = None if probabilities is None else _split(probabilities, work.parts)
        except Exception:
            self._failed(work)
        else:
            if outcomes is None:
                self._loop.call_soon(self._look, work, runner)
            else:
                work.end(Ended(outcomes, False, time.monotonic()))

    def _failed(self, work: Work) -> None:
        _log_failure(work.parts)
        self._do_in_thread(work, _run_halves)

    def _do_in_thread(self, work: Work, run: _Run) -> None:
        threading.Thread(
            target=_do, args=(work, self._stream, self._loop, run), name=f"device-{self._stream}", daemon=True
        ).start()


def _do(work: Work, stream: int, loop: asyncio.AbstractEventLoop, run: _Run) -> None:
    """Do all of ``work`` in the calling thread, and hand its end to ``loop``."""
    outcomes = run(work.runner, work.parts, stream)
    proved = any(not isinstance(outcome, InferenceFailed) for outcome in outcomes)
    ended = Ended(outcomes, not proved and not _answers_rightly(work, stream), time.monotonic())
    with contextlib.suppress(RuntimeError):  # the loop closed first: nobody is left to answer
        loop.call_soon_threadsafe(work.end, ended)


def _answers_rightly(work: Work, stream: int) -> bool:
    """Tell a dead device from images that fail: the known one does not."""
    try:
        work.check()
    except Exception:
        logger.exception("device fails on a known image stream=%d", stream)
        return False
    return True


def _run(runner: Runner, parts: Sequence[NDArray[np.uint8]], stream: int) -> Outcomes:
    """Run one batch, and after a failure its halves, down to single parts."""
    if not parts:
        return []
    try:
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return _split(runner.run(images, stream), parts)
    except Exception:
        _log_failure(parts)
        return _run_halves(runner, parts, stream)


def _run_halves(runner: Runner, parts: Sequence[NDArray[np.uint8]], stream: int) -> Outcomes:
    if len(parts) == 1:
        return [InferenceFailed("the model failed on this image; send another, or report it if it is a sound image")]
    middle = len(parts) // 2
    return _run(runner, parts[:middle], stream) + _run(runner, parts[middle:], stream)


def _split(probabilities: NDArray[np.float32], parts: Sequence[NDArray[np.uint8]]) -> Outcomes:
    outcomes: Outcomes = []
    start = 0
    for part in parts:
        outcomes.append(probabilities[start : start + len(part)])
        start += len(part)
    assert start == len(probabilities), "a runner answers every image"
    return outcomes


def _log_failure(parts: Sequence[NDArray[np.uint8]]) -> None:
    logger.exception("batch failed images=%d", sum(len(part) for part in parts))
