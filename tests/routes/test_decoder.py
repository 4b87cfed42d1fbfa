"""Where images are decoded: what waits for a thread is bounded, memory too, and a deadline frees the thread."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.errors import DeadlineExceeded, ImageTooLarge, MemoryBudgetExceeded, Overloaded
from service.model.images import EncodedImage, InputSpec
from service.routes.decoder import Decoder
from service.web.memory_budget import MemoryBudget
from tests.support.image_file import encoded
from tests.support.patience import until, wait_until

SPEC = InputSpec()
_PATIENCE_S = 60.0


def noise(side: int, kind: str = "JPEG", **options: object) -> bytes:
    """A file of noise, which takes longest to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


def of_many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan, the refinement of all coefficients, stands there many times."""
    data = noise(side, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_what_waits_for_a_thread_is_bounded() -> None:
    """One more is refused with a time to wait that follows from the decoding before; the others all get their pixels."""

    async def run() -> list[object]:
        decoder = Decoder(threads=1, max_waiting=3, memory=MemoryBudget(2**30))
        data = noise(1000)
        try:
            work = (decoder.decode_large(EncodedImage(data, SPEC), time.monotonic() + _PATIENCE_S) for _ in range(5))
            return await asyncio.gather(*work, return_exceptions=True)
        finally:
            decoder.close()

    *decoded, refused = asyncio.run(run())
    assert all(isinstance(pixels, np.ndarray) for pixels in decoded)
    assert isinstance(refused, Overloaded)
    assert refused.retry_after_s is not None
    assert refused.retry_after_s >= 1


def test_an_image_that_does_not_fit_the_budget_is_refused() -> None:
    """For good where it never fits, for now where others use the budget; without decoding any of it."""

    async def run(limit_bytes: int, used_bytes: int) -> object:
        memory = MemoryBudget(limit_bytes)
        memory.acquire(used_bytes)
        decoder = Decoder(threads=1, max_waiting=3, memory=memory)
        try:
            return await decoder.decode_large(EncodedImage(noise(300, "PNG"), SPEC), time.monotonic() + _PATIENCE_S)
        finally:
            decoder.close()
            assert memory.used_bytes == used_bytes

    with pytest.raises(ImageTooLarge, match="scale it down"):
        asyncio.run(run(1_000_000, used_bytes=0))
    with pytest.raises(MemoryBudgetExceeded):
        asyncio.run(run(2_000_000, used_bytes=1_000_000))
    assert isinstance(asyncio.run(run(2_000_000, used_bytes=0)), np.ndarray)


def test_a_passed_deadline_frees_the_thread() -> None:
    """The next image gets the thread although the one before has seconds of work left."""

    async def run() -> None:
        decoder = Decoder(threads=1, max_waiting=3, memory=MemoryBudget(2**30))
        try:
            with pytest.raises(DeadlineExceeded):
                await decoder.decode_large(EncodedImage(of_many_scans(2000, 60), SPEC), time.monotonic() + 0.05)
            await decoder.decode_large(EncodedImage(noise(300), SPEC), time.monotonic() + _PATIENCE_S)
        finally:
            decoder.close()

    asyncio.run(run())


def test_a_decode_outlives_the_event_loop_silently(caplog: pytest.LogCaptureFixture) -> None:
    """A stopped service ends its loop while a thread still decodes."""
    decoder = Decoder(threads=1, max_waiting=3, memory=MemoryBudget(2**30))

    async def run() -> None:
        image = EncodedImage(encoded(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True), SPEC)
        decode = asyncio.create_task(decoder.decode_large(image, time.monotonic() + _PATIENCE_S))
        await until(lambda: decoder.memory.used_bytes > 0)
        decode.cancel()

    asyncio.run(run())
    assert decoder.memory.used_bytes > 0, "the decode ended before its loop did"
    decoder.close()
    wait_until(lambda: not any(thread.name.startswith("decode") for thread in threading.enumerate()))
    assert not caplog.records


def test_costly_jpegs_stop_neither_others_nor_the_end(checkpoint_path: Path) -> None:
    """Under files of hundreds of scans the service stays alive, classifies a photograph, and ends with 0."""
    photograph = BytesIO()
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(photograph, "JPEG")
    attacks = [of_many_scans(256, 500), of_many_scans(700, 95), of_many_scans(700, 95)]
    jpeg = {"content-type": "image/jpeg"}
    with ServiceProcess(checkpoint_path, workers=1, request_timeout_s=2, shutdown_grace_s=0) as service:
        done = threading.Event()
        statuses: set[int] = set()

        def attack(data: bytes) -> None:
            while not done.is_set():
                response = httpx.post(service.url + "/predict", content=data, headers=jpeg, timeout=_PATIENCE_S)
                statuses.add(response.status_code)

        threads = [threading.Thread(target=attack, args=(data,)) for data in attacks]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                response = httpx.post(
                    service.url + "/predict", content=photograph.getvalue(), headers=jpeg, timeout=_PATIENCE_S
                )
                assert response.status_code == 200, response.text
                assert httpx.get(service.url + "/health/live", timeout=_PATIENCE_S).status_code == 200
        finally:
            done.set()
            for thread in threads:
                thread.join(_PATIENCE_S)
        assert 422 in statuses
        assert statuses <= {200, 422, 504}
        assert service.stop() == os.EX_OK
