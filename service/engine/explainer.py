"""Makes class activation maps on one thread, one at a time. While predictions run, they get a twentieth of one core."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from service.engine.interface import Explanation, Finish
from service.errors import InferenceFailed, Overloaded

logger = logging.getLogger(__name__)

_MAX_JOBS = 16
_MAX_WAIT_S = 3.0
_SHARE = 0.05  # of one core
_POLL_S = 0.02


class Explainer:
    """Used on one event loop."""

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        """``is_idle`` says, from any thread, whether the device has nothing to do."""
        self._is_idle = is_idle
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._jobs = 0
        self._cost_s = 0.0  # processor time of the last map
        self._not_before = 0.0  # unless the device is idle

    def begin(self, make: Callable[[], Explanation], is_wanted: Callable[[], bool], end: Finish) -> None:
        """Call ``make`` in the thread if ``is_wanted`` still says so there, and ``end`` with its result on the event loop.

        Raises Overloaded when too many wait.
        """
        wait_s = self._jobs * self._cost_s / (1.0 if self._is_idle() else _SHARE)
        if self._jobs >= _MAX_JOBS or wait_s > _MAX_WAIT_S:
            raise Overloaded("too many explanations are being made; retry shortly", retry_after_s=max(1, math.ceil(wait_s)))
        self._jobs += 1
        job = asyncio.get_running_loop().run_in_executor(self._thread, self._make, make, is_wanted)
        job.add_done_callback(partial(self._done, end))

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, make: Callable[[], Explanation], is_wanted: Callable[[], bool]) -> Explanation | None:
        while time.monotonic() < self._not_before and not self._is_idle() and is_wanted():
            time.sleep(_POLL_S)
        if not is_wanted():
            return None
        began = time.thread_time()
        try:
            return make()
        finally:
            self._cost_s = time.thread_time() - began
            self._not_before = time.monotonic() + self._cost_s * (1 / _SHARE - 1)

    def _done(self, end: Finish, job: asyncio.Future[Explanation | None]) -> None:
        self._jobs -= 1
        if job.cancelled():
            return
        if (error := job.exception()) is not None:
            logger.error("explanation failed", exc_info=error)
            end(InferenceFailed("the explanation failed on this image; send another"))
        elif (explanation := job.result()) is not None:
            end(explanation)
