"""One HTTP worker process: uvicorn around the application, on the socket that the supervisor opened."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket

from service.observability.metrics import ENGINE, FIRST_WORKER, SUPERVISOR, Metrics
from service.observability.shared_values import SharedValues
from service.processes.child import STOP_SIGNAL, beat, change_model, notify_supervisor, open_event_loop
from service.processes.http_server import HttpServer
from service.processes.remote_engine import RemoteEngine
from service.routes.app import create_app
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.http_protocol import HttpCarrier

logger = logging.getLogger(__name__)

_ACCEPT_CHECK_S = 0.05
_ENGINE_STATUS_S = 2.0
_ACCEPTED_AT_ONCE = 64


def run_worker(
    settings: Settings, keys: ApiKeys, index: int, listener: socket.socket, engine_path: str, values: SharedValues
) -> int:
    """Run worker number ``index`` on ``listener`` until STOP_SIGNAL; return the exit status."""
    with open_event_loop() as runner:
        return runner.run(_serve(settings, keys, index, listener, engine_path, values))


async def _serve(
    settings: Settings, keys: ApiKeys, index: int, listener: socket.socket, engine_path: str, values: SharedValues
) -> int:
    metrics = Metrics(values, FIRST_WORKER + index)
    service_facts = values.facts(SUPERVISOR)

    def note_readiness() -> None:
        metrics.facts.ready = engine.state == "ready"
        notify_supervisor()

    engine = RemoteEngine(
        engine_path,
        values.facts(ENGINE),
        max_batch_size=settings.max_batch_size,
        max_queue_images=settings.max_queue_images,
        on_change=note_readiness,
    )
    app = create_app(
        settings,
        engine,
        metrics=metrics,
        keys=keys,
        is_draining=lambda: service_facts.draining,
        gave_up=lambda: service_facts.engine_gave_up,
        change_model=change_model,
    )
    server = _Server(
        HttpCarrier(app.entry, settings, metrics),
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(STOP_SIGNAL, server.stop)
    beating = loop.create_task(beat(metrics.facts))
    gc.collect()
    gc.freeze()
    await engine.until_reported(_ENGINE_STATUS_S)  # one that replaces a dead worker is ready when it accepts
    accepting = loop.create_task(server.accept_under_load(listener))
    await server.serve(sockets=[listener])
    accepting.cancel()
    beating.cancel()
    engine.close()
    app.close()
    return 0


class _Server(HttpServer):
    """The server of predictions, which also accepts all waiting connections under load and before it stops."""

    async def accept_under_load(self, listener: socket.socket) -> None:
        """Accept the connections that wait: the event loop accepts one in each iteration, which is long in a busy worker.

        Without this, a health probe's new connection waited for seconds behind others while 256 busy ones were answered.
        """
        while not self.should_exit:
            await asyncio.sleep(_ACCEPT_CHECK_S)
            await self._accept_waiting(listener, _ACCEPTED_AT_ONCE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept first the connections that wait: closing the last listener would reset those connections."""
        for listener in sockets or []:
            while await self._accept_waiting(listener, _ACCEPTED_AT_ONCE):
                pass
        await super().shutdown(sockets)

    async def _accept_waiting(self, listener: socket.socket, most: int) -> int:
        """Accept up to ``most`` waiting connections and begin to serve them; return how many there were."""
        waiting: list[socket.socket] = []
        while len(waiting) < most:
            try:
                connection, _ = listener.accept()
            except OSError:  # none is left, or the listener is closed
                break
            connection.setblocking(False)
            waiting.append(connection)
        await asyncio.gather(*map(self._serve_connection, waiting), return_exceptions=True)  # some have left again
        return len(waiting)

    async def _serve_connection(self, connection: socket.socket) -> None:
        protocol = self.config.http_protocol_class
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: protocol(config=self.config, server_state=self.server_state, app_state={}),  # type: ignore[call-arg]
            connection,
            ssl=self.config.ssl,
        )
