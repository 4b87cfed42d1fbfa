"""Decoding beside the event loop: small images at once, large ones in a bounded pool of threads.

Owns: where an image is decoded and how many wait for it. Does not know: formats, HTTP, batching.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from service.errors import Overloaded, deadline_passed
from service.model.images import EncodedImage, InputSpec

_WAITING_PER_THREAD = 32


class Decoder:
    """Decodes within ``max_image_pixels``; at most 32 large images wait for each of ``threads``."""

    def __init__(self, *, max_image_pixels: int, threads: int) -> None:
        self._max_image_pixels = max_image_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._threads = threads
        self._places = threads * (1 + _WAITING_PER_THREAD)

    def gate(self) -> asyncio.Semaphore:
        """Make what lets through, of one request, an image for each thread at a time: none is refused for its company."""
        return asyncio.Semaphore(self._threads)

    async def decode(self, data: bytes | memoryview, spec: InputSpec, deadline: float) -> NDArray[np.uint8]:
        """Decode one image to uint8 (3, size, size) before ``deadline`` (``time.monotonic()``, seconds).

        Raises what ``EncodedImage`` raises, DeadlineExceeded, and Overloaded when too many large images wait already.
        """
        image = self.open(data)
        return image.decode(spec) if image.is_small else await self.decode_large(image, spec, deadline)

    def open(self, data: bytes | memoryview) -> EncodedImage:
        """Read an image's header; raise what ``EncodedImage`` raises."""
        return EncodedImage(data, max_pixels=self._max_image_pixels)

    async def decode_large(self, image: EncodedImage, spec: InputSpec, deadline: float) -> NDArray[np.uint8]:
        """Decode in one of the threads what is not small; see ``decode``."""
        if not self._places:
            raise Overloaded("too many large images are being decoded; retry shortly", retry_after_s=1)
        self._places -= 1
        loop = asyncio.get_running_loop()
        job = self._pool.submit(_decode_in_time, image, spec, deadline)
        # The place is taken until the thread is done with it, also when nobody waits for the image any more.
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._give_place_back))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise deadline_passed() from None

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _give_place_back(self) -> None:
        self._places += 1


def _decode_in_time(image: EncodedImage, spec: InputSpec, deadline: float) -> NDArray[np.uint8]:
    if time.monotonic() >= deadline:
        raise deadline_passed()
    return image.decode(spec)
