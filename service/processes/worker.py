"""One HTTP worker process: uvicorn around the application, on the socket that the supervisor opened."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import socket
import struct
from typing import Any

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

logger = logging.getLogger(__name__)

_ENGINE_STATUS_S = 2.0
_ACCEPTED_AT_ONCE = 64
_OTHERS_S = 0.005  # in which a worker with fewer connections accepts
_LEAST_BEGINNING = 1024  # or else some hundred silent handshakes hold up probes
_HANDSHAKE_S = 1.0  # that every handshake has, also when there are too many or the service stops
_MEMORY_CHECK_S = 1.0


async def run_worker(
    settings: Settings, keys: ApiKeys, index: int, listener: socket.socket, engine_path: str, values: SharedValues
) -> int:
    """Run worker number ``index`` on ``listener`` until STOP_SIGNAL; return the exit status."""
    metrics = Metrics(values, FIRST_WORKER + index)
    engine_reports = asyncio.Event()

    def note_readiness() -> None:
        metrics.facts.ready = engine.state == "ready"
        engine_reports.set()

    engine = RemoteEngine(
        engine_path,
        values.facts(ENGINE),
        max_batch_size=settings.max_batch_size,
        max_queue_images=settings.max_queue_images,
        on_change=note_readiness,
    )
    app = Application(settings, engine, metrics=metrics, keys=keys, change_model=change_model)
    server = _Server(
        HttpCarrier(app.entry, settings, metrics),
        listener,
        values,
        settings,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(STOP_SIGNAL, server.stop)
    returning = loop.create_task(_return_memory(app.context.decoder.memory))
    gc.collect()
    gc.freeze()
    if values.facts(ENGINE).ready:  # one that replaces a dead worker is ready when it accepts
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine_reports.wait(), _ENGINE_STATUS_S)
    await server.serve(sockets=[listener])
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


class _Server(HttpServer):
    """The server of predictions: it shares connections with the other workers, and accepts what waits before it stops.

    Without this, the worker that wakes first accepts all connections that a client opens, and the others idle.
    """

    def __init__(
        self, carrier: HttpCarrier, listener: socket.socket, values: SharedValues, settings: Settings, **options: Any
    ) -> None:
        super().__init__(carrier, **options)
        self._listener = listener
        self._workers = [values.facts(row) for row in range(FIRST_WORKER, values.rows)]
        self._most_beginning = max(settings.max_connections, _LEAST_BEGINNING)
        self._handshake_s = settings.header_timeout_s
        self._beginning: dict[asyncio.Task[Any], float] = {}  # connections since when, with TLS until the handshake is over
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        self.servers = []
        self.started = True
        self._loop.add_reader(self._listener, self._accept_share)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept first the connections that wait, which closing the last listener would reset, and let handshakes end."""
        self._loop.remove_reader(self._listener)
        while self._accept(_ACCEPTED_AT_ONCE) or self._beginning:
            ended, _ = await asyncio.wait(self._beginning, timeout=_HANDSHAKE_S)
            if not ended and len(self._beginning) < self._most_beginning:
                break
        await super().shutdown(sockets)

    def _accept_share(self) -> None:
        """Accept until this worker has its share; leave the rest to the others, for a moment."""
        waiting = _waiting_connections(self._listener)
        if not waiting:  # another worker was faster, or this system does not say
            self._accept(1)
            return
        own = len(self.server_state.connections) + len(self._beginning)
        alive = [worker for worker in self._workers if worker.process_id]
        connections = sum(worker.connections for worker in alive) + len(self._beginning) + waiting
        share = math.ceil(connections / len(alive))
        left = waiting - self._accept(min(waiting, share - own))
        if left:
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_OTHERS_S, self._accept_rest, left)

    def _accept_rest(self, left: int) -> None:
        """Accept what the others had no time for, then shares again."""
        if not self.should_exit:
            self._accept(min(left, _waiting_connections(self._listener)))
            self._loop.add_reader(self._listener, self._accept_share)

    def _accept(self, most: int) -> int:
        """Accept up to ``most`` connections and begin to serve them; return how many there were.

        Handshakes that take long lose their places when there are no more.
        """
        now = self._loop.time()
        for beginning, began in self._beginning.items() if len(self._beginning) >= self._most_beginning else ():
            if now - began < _HANDSHAKE_S:
                break
            beginning.cancel()
        most = max(0, min(most, self._most_beginning - len(self._beginning)))
        for count in range(most):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # none is left
                return count
            connection.setblocking(False)
            beginning = self._loop.create_task(self._serve_connection(connection))
            self._beginning[beginning] = now
            beginning.add_done_callback(self._beginning.pop)
        return most

    async def _serve_connection(self, connection: socket.socket) -> None:
        protocol, tls = self.config.http_protocol_class, self.config.ssl
        with contextlib.suppress(OSError):  # it has left again, or its handshake failed
            await self._loop.connect_accepted_socket(
                lambda: protocol(config=self.config, server_state=self.server_state, app_state={}),  # type: ignore[call-arg]
                connection,
                ssl=tls,
                ssl_handshake_timeout=self._handshake_s if tls else None,
            )


def _waiting_connections(listener: socket.socket) -> int:
    """Return how many connections wait to be accepted; 0 where the system does not say, as gVisor."""
    return int(struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24)[0])  # tcpi_unacked
