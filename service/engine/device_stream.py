"""One stream of the device: begins a batch and reports its end on the event loop; runs a failing batch again by halves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed
from service.runtime.runner import PolledRunner, Runner

logger = logging.getLogger(__name__)

Outcomes = list[NDArray[np.float32] | InferenceFailed]


@dataclass(frozen=True, slots=True)
class Ended:
    """The outcome of each of a batch's requests, in order; ``at`` is a ``time.monotonic()``.

    ``device_failed``: no request succeeded, and neither did the check with known images.
    """

    outcomes: Outcomes
    device_failed: bool
    at: float


@dataclass(frozen=True, slots=True)
class Work:
    """One batch: the requests' arrays, uint8 (n, 3, size, size), for ``runner``; none, to only ``check`` the device.

    ``check`` raises unless the device answers known images; it is called where no request succeeded. ``end`` is called once,
    on the event loop.
    """

    runner: Runner
    requests: Sequence[NDArray[np.uint8]]
    check: Callable[[], None]
    end: Callable[[Ended], None]


class DeviceStream:
    """Number ``number`` of a runner's streams, one batch at a time; made and used on one event loop.

    A batch runs in the stream's thread, which stays in the runner until it is done. A ``PolledRunner`` begins it on the event
    loop instead and is polled once per iteration: waking a thread, and waiting for the interpreter in it, takes longer than a
    small batch on a GPU. Checks, and batches that failed, which may take long, run in the thread for every runner.
    """

    def __init__(self, runner: Runner, number: int) -> None:
        self._number = number
        self._polled = isinstance(runner, PolledRunner)
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name=f"device-{number}", daemon=True).start()

    def begin(self, work: Work) -> None:
        """Begin a batch. The one before has ended; its runner may have been another one of the same class."""
        if self._polled and work.requests:
            try:
                work.runner.begin(work.requests, self._number)  # type: ignore[attr-defined]  # a PolledRunner
                self._loop.call_soon(self._poll, work)
            except Exception:
                self._retry(work)
        else:
            self._jobs.put(lambda: self._finish(work, _run(work.runner, work.requests, self._number)))

    def close(self) -> None:
        """Let the thread end after the batch that it runs; a hung one is left behind."""
        self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _poll(self, work: Work) -> None:
        try:
            probabilities = work.runner.look(self._number)  # type: ignore[attr-defined]  # a PolledRunner
            outcomes = None if probabilities is None else _split(probabilities, work.requests)
        except Exception:
            self._retry(work)
            return
        if outcomes is None:
            self._loop.call_soon(self._poll, work)
        else:
            work.end(Ended(outcomes, False, time.monotonic()))

    def _retry(self, work: Work) -> None:
        _log_failure(work.requests)
        self._jobs.put(lambda: self._finish(work, _run_halves(work.runner, work.requests, self._number)))

    def _finish(self, work: Work, outcomes: Outcomes) -> None:
        """Report the end of a batch, from the thread."""
        device_failed = all(isinstance(outcome, InferenceFailed) for outcome in outcomes) and not self._is_sound(work)
        ended = Ended(outcomes, device_failed, time.monotonic())
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(work.end, ended)

    def _is_sound(self, work: Work) -> bool:
        """Tell images that cannot be predicted from a broken device, which fails known images too."""
        try:
            work.check()
        except Exception:
            logger.exception("device fails on a known image stream=%d", self._number)
            return False
        return True


def _run(runner: Runner, requests: Sequence[NDArray[np.uint8]], stream: int) -> Outcomes:
    """Run one batch, and after a failure its halves, down to single requests."""
    if not requests:
        return []
    try:
        images = requests[0] if len(requests) == 1 else np.concatenate(requests)
        return _split(runner.run(images, stream), requests)
    except Exception:
        _log_failure(requests)
        return _run_halves(runner, requests, stream)


def _run_halves(runner: Runner, requests: Sequence[NDArray[np.uint8]], stream: int) -> Outcomes:
    if len(requests) == 1:
        return [InferenceFailed("the model failed on this image; send another, or report it if it is a sound image")]
    middle = len(requests) // 2
    return _run(runner, requests[:middle], stream) + _run(runner, requests[middle:], stream)


def _split(probabilities: NDArray[np.float32], requests: Sequence[NDArray[np.uint8]]) -> Outcomes:
    outcomes: Outcomes = []
    start = 0
    for images in requests:
        outcomes.append(probabilities[start : start + len(images)])
        start += len(images)
    assert start == len(probabilities), "a runner answers every image"
    return outcomes


def _log_failure(requests: Sequence[NDArray[np.uint8]]) -> None:
    logger.exception("batch failed images=%d", sum(map(len, requests)))
