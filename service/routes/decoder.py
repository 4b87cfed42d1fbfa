"""Decodes large images in threads; small ones are decoded at once, on the event loop."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from service.errors import QUEUE_FULL, ImageTooLarge, Overloaded, deadline_passed
from service.model.images import EncodedImage
from service.web.body import until
from service.web.memory_budget import MemoryBudget

_FIRST_GUESS_S = 0.02  # decoding a photograph of a camera
_NEWEST_COUNTS = 0.1


class Decoder:
    """Decodes large images within ``memory``, in ``threads``, for which at most ``max_waiting`` images wait."""

    def __init__(self, *, threads: int, max_waiting: int, memory: MemoryBudget) -> None:
        self.memory = memory
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._threads = threads
        self._places = threads + max_waiting
        self._free = threading.Semaphore(self._places)
        self._decode_s = _FIRST_GUESS_S  # of one large image, the newest counting most

    def slots(self) -> asyncio.Semaphore:
        """Return what lets pass, of one request's images, one for each thread at a time, so that none is refused."""
        return asyncio.Semaphore(self._threads)

    async def decode_large(
        self, image: EncodedImage, deadline: float, slots: asyncio.Semaphore | None = None
    ) -> NDArray[np.uint8]:
        """Decode one image to uint8 (3, size, size) in a thread before ``deadline`` (``time.monotonic()``, seconds).

        Raises what ``EncodedImage.decode`` raises, MemoryBudgetExceeded, and Overloaded when too many large images wait
        already. ``slots`` is what ``slots()`` returned for the image's request.
        """
        if slots is not None:
            async with slots:
                return await self.decode_large(image, deadline)
        needed_bytes = image.memory_bytes()
        if needed_bytes > self.memory.limit_bytes:
            raise ImageTooLarge(
                f"decoding the image takes {needed_bytes / 1e6:,.0f} MB, more than the service may use; scale it down, or save"
                " a progressive JPEG as a baseline one"
            )
        if not self._free.acquire(blocking=False):
            raise Overloaded(QUEUE_FULL, retry_after_s=max(1, math.ceil(self._places * self._decode_s / self._threads)))
        job = self._pool.submit(self._decode_in_thread, image, deadline, needed_bytes)
        # Its place is free once the thread is done with it, also when nobody waits for the image any more, or no loop runs.
        job.add_done_callback(lambda _: self._free.release())
        return await until(deadline, asyncio.wrap_future(job))

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode_in_thread(self, image: EncodedImage, deadline: float, needed_bytes: int) -> NDArray[np.uint8]:
        began = time.monotonic()
        if began >= deadline:
            raise deadline_passed()
        self.memory.acquire(needed_bytes)
        try:
            return image.decode(deadline)
        finally:
            self.memory.release(needed_bytes)
            self._decode_s += _NEWEST_COUNTS * (time.monotonic() - began - self._decode_s)
