"""Makes class activation maps on one thread, one at a time, for at most a quarter of one core: predictions come first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed, Overloaded

logger = logging.getLogger(__name__)

_MAX_JOBS = 16
_PAUSE = 3  # times the processor time of a map, before the next one begins

Heatmap = tuple[int, NDArray[np.float32]]


class Explainer:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._jobs = 0
        self._not_before = 0.0

    def begin(
        self, make: Callable[[], Heatmap], is_wanted: Callable[[], bool], end: Callable[[Heatmap | InferenceFailed], None]
    ) -> None:
        """Call ``make`` in the thread if ``is_wanted`` still says so there, and ``end`` with its result on the event loop.

        Raises Overloaded when too many wait.
        """
        if self._jobs >= _MAX_JOBS:
            raise Overloaded("too many explanations are being made; retry shortly", retry_after_s=1)
        self._jobs += 1
        job = asyncio.get_running_loop().run_in_executor(self._thread, self._make, make, is_wanted)
        job.add_done_callback(partial(self._done, end))

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, make: Callable[[], Heatmap], is_wanted: Callable[[], bool]) -> Heatmap | None:
        time.sleep(max(0.0, self._not_before - time.monotonic()))
        if not is_wanted():
            return None
        began = time.thread_time()
        try:
            return make()
        finally:
            self._not_before = time.monotonic() + _PAUSE * (time.thread_time() - began)

    def _done(self, end: Callable[[Heatmap | InferenceFailed], None], job: asyncio.Future[Heatmap | None]) -> None:
        self._jobs -= 1
        if job.cancelled():
            return
        if (error := job.exception()) is not None:
            logger.error("explanation failed", exc_info=error)
            end(InferenceFailed("the explanation failed on this image; send another"))
        elif (heatmap := job.result()) is not None:
            end(heatmap)
