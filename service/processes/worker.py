"""One HTTP worker process: the application behind its server, on the socket that the supervisor opened."""

from __future__ import annotations

import asyncio
import gc
import socket

from service.observability.metrics import ENGINE, FIRST_WORKER, Metrics
from service.observability.shared_values import SharedValues
from service.processes.child import STOP_SIGNAL, change_model, return_memory
from service.processes.http_server import HttpServer
from service.processes.remote_engine import RemoteEngine
from service.routes.app import Application
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.http_protocol import HttpCarrier
from service.web.memory_budget import MemoryBudget

_ENGINE_STATUS_S = 2.0
_MEMORY_CHECK_S = 1.0


async def run_worker(
    settings: Settings, keys: ApiKeys, index: int, listener: socket.socket, engine_path: str, values: SharedValues
) -> int:
    """Run worker number ``index`` on ``listener`` until STOP_SIGNAL; return the exit status."""
    metrics = Metrics(values, FIRST_WORKER + index)

    def note_readiness() -> None:
        metrics.facts.ready = engine.state == "ready"

    engine = RemoteEngine(
        engine_path,
        values.facts(ENGINE),
        max_batch_size=settings.max_batch_size,
        max_queue_images=settings.max_queue_images,
        on_change=note_readiness,
    )
    app = Application(settings, engine, metrics=metrics, keys=keys, change_model=change_model)
    server = HttpServer(HttpCarrier(app.entry, settings, metrics), listener, values, settings)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(STOP_SIGNAL, server.stop)
    returning = loop.create_task(_return_memory(app.context.decoder.memory))
    gc.collect()
    gc.freeze()
    limit = loop.time() + _ENGINE_STATUS_S
    while values.facts(ENGINE).ready and not metrics.facts.ready and loop.time() < limit:
        await asyncio.sleep(0.01)  # one that replaces a dead worker is ready when it accepts
    await server.serve()
    returning.cancel()
    engine.close()
    app.close()
    return 0


async def _return_memory(memory: MemoryBudget) -> None:
    """Return the memory of large bodies and images to the system once most of them are gone, until cancelled."""
    while True:
        await asyncio.sleep(_MEMORY_CHECK_S)
        if memory.has_fallen():
            await asyncio.to_thread(return_memory)
