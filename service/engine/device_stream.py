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

from service.engine.interface import ModelInfo, Request
from service.errors import InferenceFailed
from service.model.checkpoint import Canary
from service.model.class_activation import ClassActivation
from service.runtime.open_runner import check_canary
from service.runtime.runner import PolledRunner, Runner

logger = logging.getLogger(__name__)

Arrays = Sequence[NDArray[np.uint8]]  # (n, 3, size, size) of each request
Outcomes = Sequence[NDArray[np.float32] | InferenceFailed]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner and what it serves, the known images with their answers that check it, and the maps that explain its answers."""

    runner: Runner
    info: ModelInfo
    canary: Canary | None
    maps: ClassActivation


@dataclass(slots=True)
class Batch:
    """What one stream works on; without requests it is a check of the device. Times are ``time.monotonic()``.

    When it has ended, ``outcomes`` has one for each request, in order. ``device_failed``: no request succeeded, and neither did
    the check with known images.
    """

    model: LoadedModel
    stream: int
    requests: list[Request]
    size: int  # in images
    started: float
    ended: float = 0.0
    outcomes: Outcomes = ()
    device_failed: bool = False


class DeviceStream:
    """Number ``number`` of a runner's streams, one batch at a time; made and used on one event loop.

    A batch runs in the stream's thread, which stays in the runner until it is done. A ``PolledRunner`` begins it on the event
    loop instead and is polled once per iteration: waking a thread, and waiting for the interpreter in it, takes longer than a
    small batch on a GPU. Checks, and batches that failed, which may take long, run in the thread for every runner.
    """

    def __init__(self, number: int, end: Callable[[Batch], None]) -> None:
        """``end`` is called once for each batch, on the event loop."""
        self._number = number
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name=f"device-{number}", daemon=True).start()

    def begin(self, batch: Batch) -> None:
        """Begin a batch; the one before has ended."""
        runner, arrays = batch.model.runner, [request.images for request in batch.requests]
        if not arrays or not isinstance(runner, PolledRunner):
            self._run_in_thread(batch, arrays)
            return
        try:
            runner.begin(arrays, self._number)
            self._loop.call_soon(self._poll, runner, batch, arrays)
        except Exception as error:
            self._run_in_thread(batch, arrays, error)

    def close(self) -> None:
        """Let the thread end after the batch that it runs; a hung one is left behind."""
        self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # which holds its model until the next one comes

    def _poll(self, runner: PolledRunner, batch: Batch, arrays: Arrays) -> None:
        try:
            probabilities = runner.look(self._number)
            if probabilities is None:
                self._loop.call_soon(self._poll, runner, batch, arrays)
                return
            batch.outcomes, batch.ended = _split(probabilities, arrays), time.monotonic()
        except Exception as error:
            self._run_in_thread(batch, arrays, error)
        else:
            self._end(batch)

    def _run_in_thread(self, batch: Batch, arrays: Arrays, error: Exception | None = None) -> None:
        self._jobs.put(lambda: self._finish(batch, _run(batch.model.runner, arrays, self._number, error)))

    def _finish(self, batch: Batch, outcomes: Outcomes) -> None:
        """Report the end of a batch, from the thread."""
        batch.outcomes = outcomes
        batch.device_failed = all(isinstance(each, InferenceFailed) for each in outcomes) and not self._is_sound(batch)
        batch.ended = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._end, batch)

    def _is_sound(self, batch: Batch) -> bool:
        """Tell images that cannot be predicted from a broken device, which fails known images too."""
        try:
            check_canary(batch.model.runner, batch.model.canary, self._number)
        except Exception:
            logger.exception("device fails on a known image stream=%d", self._number)
            return False
        return True


def _run(runner: Runner, arrays: Arrays, stream: int, error: Exception | None = None) -> Outcomes:
    """Run one batch, unless it has failed with ``error``, and after a failure its halves, down to single requests."""
    if not arrays:
        return []
    if error is None:
        try:
            images = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            return _split(runner.run(images, stream), arrays)
        except Exception as failure:
            return _run(runner, arrays, stream, failure)
    logger.error("batch failed images=%d", sum(map(len, arrays)), exc_info=error)
    if len(arrays) == 1:
        return [InferenceFailed("the model failed on this image; send another, or report it if it is a sound image")]
    middle = len(arrays) // 2
    return [*_run(runner, arrays[:middle], stream), *_run(runner, arrays[middle:], stream)]


def _split(probabilities: NDArray[np.float32], arrays: Arrays) -> Outcomes:
    outcomes: list[NDArray[np.float32] | InferenceFailed] = []
    start = 0
    for images in arrays:
        outcomes.append(probabilities[start : start + len(images)])
        start += len(images)
    assert start == len(probabilities), "a runner answers every image"
    return outcomes
