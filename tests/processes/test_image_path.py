"""The path of an uploaded image is as short as docs/architecture.md has it."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

import service
from service.engine.model_files import ModelFiles
from service.engine.model_store import ModelStore
from service.model.images import InputSpec, decode_image
from service.observability.metrics import ENGINE, FIRST_WORKER, Metrics, make_values
from service.processes.engine_process import EngineServer
from service.processes.remote_engine import RemoteEngine
from service.routes.app import Application
from service.settings import load_settings
from service.web.http_protocol import HttpCarrier
from tests.support.image_file import encoded
from tests.support.patience import until

SERVICE = Path(service.__file__).parent
PAGE = SERVICE.parent / "docs" / "architecture.md"
MOST_FILES = 10


class ImageTrace:
    """Notes the files of the service with a function that has the image among its variables, encoded or as pixels."""

    def __init__(self, image: bytes) -> None:
        self.files: set[str] = set()
        self.is_on = False
        self._wanted = (image, decode_image(image, InputSpec()).tobytes())

    def __call__(self, frame: FrameType, event: str, result: object) -> None:
        """See ``sys.setprofile``."""
        path = Path(frame.f_code.co_filename)
        if self.is_on and event in ("call", "return") and path.is_relative_to(SERVICE):
            name = path.relative_to(SERVICE).as_posix()
            if name not in self.files and any(map(self._holds, (*frame.f_locals.values(), result))):
                self.files.add(name)

    def _holds(self, value: object) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._holds, value))
        if not isinstance(value, (bytes, bytearray, memoryview, np.ndarray)):
            return False
        data = bytes(value) if not isinstance(value, np.ndarray) else value.tobytes()
        return any(wanted in data for wanted in self._wanted)


@pytest.mark.slow
def test_an_image_is_in_the_hands_of_the_files_that_the_documentation_names(tmp_path: Path) -> None:
    """From the connection in a worker to the model in the engine process, in at most ten files."""
    image = encoded(Image.effect_noise((128, 128), 60).convert("RGB"), "JPEG")
    trace = ImageTrace(image)
    threading.setprofile(trace)  # of the device's threads
    try:
        asyncio.run(predict(image, tmp_path / "engine", trace))
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    section = PAGE.read_text().partition("## The path of an uploaded image")[2].partition("\n## ")[0]
    named = re.findall(r"^\d+\. \[([\w/]+\.py)\]", section, re.MULTILINE)
    assert trace.files == set(named)
    assert len(named) <= MOST_FILES


async def predict(image: bytes, path: Path, trace: ImageTrace) -> None:
    """Upload ``image`` twice, the second time under ``trace``, to a worker and an engine of the real model."""
    settings, values = load_settings([]), make_values(1)
    values.facts(ENGINE).beat_at = math.inf  # no process beats here
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        served = EngineServer(settings, Metrics(values, ENGINE), ModelStore(settings, ModelFiles()))
        running = asyncio.create_task(served.run(listener))
        engine = RemoteEngine(str(path), values.facts(ENGINE), max_batch_size=64, max_queue_images=64)
        await until(lambda: engine.state == "ready" or running.done())
        app = Application(settings, engine, metrics=Metrics(values, FIRST_WORKER))
        carrier = HttpCarrier(app.entry, settings, app.context.metrics)
        server = await asyncio.get_running_loop().create_server(carrier, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
        for trace.is_on in (False, True):
            sys.setprofile(trace if trace.is_on else None)
            writer.write(head % len(image) + image)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer)
            assert length is not None
            await reader.readexactly(int(length[1]))
            assert answer.startswith(b"HTTP/1.1 200 ")
        trace.is_on = False
        writer.close()
        server.close()
        engine.close()
        app.close()
        served.stop()
        await running
