"""Explanations beside the device: class activation maps on one thread of their own, a bounded number waiting.

Owns: the thread and the bound. Does not know: how a map is made, the wire, HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlineExceeded, InferenceFailed, Overloaded
from service.model.class_activation import ClassActivation

logger = logging.getLogger(__name__)

_MAX_WAITING = 16  # at about 50 ms each, under a second of work


class Explainer:
    """Makes one map at a time: explanations may not take the cores that predictions live on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._waiting = 0

    async def heatmap(
        self, maps: ClassActivation, image: NDArray[np.uint8], label: int | None, deadline: float
    ) -> tuple[int, NDArray[np.float32]]:
        """See ``ClassActivation.heatmap``; ``deadline`` is a ``time.monotonic()``, in seconds.

        Raises Overloaded when too many wait, DeadlineExceeded, and InferenceFailed when the map cannot be made.
        """
        if self._waiting >= _MAX_WAITING:
            raise Overloaded("too many explanations are being made; retry shortly", retry_after_s=1)
        self._waiting += 1
        try:
            job = asyncio.get_running_loop().run_in_executor(self._thread, _in_time, maps, image, label, deadline)
            return await asyncio.wait_for(job, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise _late() from None
        except DeadlineExceeded:
            raise
        except Exception as error:
            logger.exception("explanation failed")
            raise InferenceFailed("the explanation failed on this image; send another") from error
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _in_time(
    maps: ClassActivation, image: NDArray[np.uint8], label: int | None, deadline: float
) -> tuple[int, NDArray[np.float32]]:
    if time.monotonic() >= deadline:
        raise _late()
    return maps.heatmap(image, label)


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the explanation was ready; retry, or allow more time")
