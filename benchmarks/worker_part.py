"""``python -m benchmarks.worker_part [CHECKOUT ...]``: processor time of a worker process for a request to ``/predict``.

A worker's application, protocol and engine connection are fed with requests as many connections would send them at once. There
are no sockets to clients and no model: an engine in a thread of its own responds immediately.

Only the time of the event loop's thread counts, so it depends less on what else the machine does than a rate under load: on a
quiet machine the lowest tenth of the rounds is the same from run to run within two or three per cent. A checkout may be
followed by settings, as in ``.,SERVICE_ACCESS_LOG=true,SERVICE_CORS_ORIGINS=*``. Each is measured by its own copy of this file
in processes of its own, several times and in alternation; the table has the median of the medians, and the least of the lowest
tenths.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import numpy as np
import uvloop

from benchmarks.load.uploads import form_request, parse_headers, small_jpegs
from benchmarks.servers.machine import describe_machine
from service.engine.interface import EngineStatus, ModelInfo, Outcome, Prediction
from service.model.images import InputSpec
from service.observability.logs import set_up_logs
from service.observability.metrics import ENGINE, make_values
from service.processes import wire
from service.processes.remote_engine import RemoteEngine
from service.routes.app import Application
from service.settings import load_settings
from service.web.http_protocol import HttpCarrier

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MODEL = ModelInfo("resnet18-cifar10", "0123456789ab", _CLASSES, InputSpec())
_WARM_UP_ROUNDS = 50


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_part", description=__doc__)
    parser.add_argument("checkouts", nargs="*", default=["."], metavar="CHECKOUT[,SETTING=VALUE ...]")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 16, 64], help="requests that arrive at the same time")
    parser.add_argument("--header", nargs="*", default=[], metavar="NAME:VALUE", help="such as 'X-API-Key: secret'")
    parser.add_argument("--requests", type=int, default=20_000, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each checkout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            times = runner.run(_measure(options.together[0], options.requests, options.header))
        print(median(times), quantiles(times, n=10)[0])
        return 0
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), end="\n\n")
    print("| requests at once | checkout | median | lowest tenth |\n| ---: | --- | ---: | ---: |")
    for together in options.together:
        arguments = ["--one", "--together", str(together), "--requests", str(options.requests)]
        arguments += ["--header", *options.header] if options.header else []  # which an older checkout does not know
        rows: dict[str, list[tuple[float, float]]] = {checkout: [] for checkout in options.checkouts}
        for _ in range(options.turns):
            for checkout, measured in rows.items():
                measured.append(measure_in_process(checkout, arguments))
        for checkout, measured in rows.items():
            medians, lows = zip(*measured, strict=True)
            print(f"| {together} | {checkout} | {median(medians):.1f} µs | {min(lows):.1f} µs |", flush=True)
    return 0


def measure_in_process(contender: str, arguments: list[str]) -> tuple[float, float]:
    """Return the median and the lowest tenth, in microseconds, of a checkout with its settings."""
    checkout, *settings = contender.split(",")
    path = Path(checkout).resolve()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker_part", *arguments],
        env={**os.environ, "PYTHONPATH": str(path), **dict(setting.split("=", 1) for setting in settings)},
        cwd=path,
        capture_output=True,  # an access log is written to standard error
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-4000:]}")
    middle, low = map(float, done.stdout.split())
    return middle, low


async def _measure(together: int, requests: int, headers: list[str]) -> list[float]:
    """Microseconds of processor time of one of ``together`` requests, for each round."""
    settings = load_settings([])
    set_up_logs(settings)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/engine"
        threading.Thread(target=_answer_at_once, args=(path,), name="engine", daemon=True).start()
        ready = asyncio.Event()
        facts = make_values(1).facts(ENGINE)
        facts.beat_at = math.inf
        engine = RemoteEngine(path, facts, max_batch_size=64, max_queue_images=4 * together, on_change=ready.set)
        while engine.state != "ready":
            ready.clear()
            await ready.wait()
    app = Application(settings, engine)
    carrier = HttpCarrier(app.entry, app.context.settings, app.context.metrics)
    arrived = _Arrivals()
    connections = []
    for _ in range(together):
        protocol = carrier()
        protocol.connection_made(cast(asyncio.Transport, _NoTransport(arrived)))
        connections.append(protocol)
    bodies = [form_request("/predict", image, headers=parse_headers(headers)) for image in small_jpegs()]
    gc.collect()
    gc.freeze()
    times = []
    for number in range(_WARM_UP_ROUNDS + max(10, requests // together)):
        arrived.expect(together)
        began = time.thread_time()
        for index, connection in enumerate(connections):
            connection.data_received(bodies[(number * together + index) % len(bodies)])
        await arrived.all.wait()
        times.append((time.thread_time() - began) / together * 1e6)
    engine.close()
    app.close()
    return times[_WARM_UP_ROUNDS:]


class _Arrivals:
    """Counts the responses of a round."""

    def __init__(self) -> None:
        self.all = asyncio.Event()
        self._left = 0

    def expect(self, answers: int) -> None:
        self.all.clear()
        self._left = answers

    def count(self, answer: bytes) -> None:
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"unexpected response: {answer[:200]!r}")
        self._left -= 1
        if not self._left:
            self.all.set()


class _NoTransport:
    """A client's connection without a socket: what is written is counted."""

    def __init__(self, arrived: _Arrivals) -> None:
        self.write: Callable[[bytes], None] = arrived.count

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def is_closing(self) -> bool:
        return False

    def resume_reading(self) -> None:
        pass


def _answer_at_once(path: str) -> None:
    """Serve as the engine on the Unix socket ``path``, from an event loop of this thread."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(_EngineConnection, path)
        await server.serve_forever()

    asyncio.run(serve())


class _EngineConnection(wire.Connection[tuple[int, Outcome]]):
    """Responds to every image with the same probabilities."""

    def __init__(self) -> None:
        super().__init__(wire.pack_outcomes)
        scores = np.arange(1, 1 + len(_CLASSES), dtype=np.float32)[None]
        self._prediction = Prediction(scores / scores.sum(), _MODEL, 0.001, 0.002, 16)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.send(wire.pack_status(EngineStatus("ready", _MODEL, "cpu", "none")))

    def received(self, head: Any, body: bytes) -> None:
        rows = wire.unpack_requests(head, body, _MODEL.input.size)
        self.send(wire.pack_outcomes([(id_, self._prediction) for id_, *_ in rows]))


if __name__ == "__main__":
    sys.exit(main())
