"""The server of predictions: it accepts a share of the connections, and before it stops, what waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import struct

from service.observability.metrics import FIRST_WORKER
from service.observability.shared_values import SharedValues
from service.settings import Settings
from service.web.http_protocol import HttpCarrier
from service.web.tls import open_tls

logger = logging.getLogger(__name__)

_ACCEPTED_AT_ONCE = 64
_OTHERS_S = 0.005  # in which a worker with fewer connections accepts
_LEAST_BEGINNING = 1024  # or else some hundred silent handshakes hold up probes
_HANDSHAKE_S = 1.0  # that every handshake has, also when there are too many or the service stops
_DRAIN_CHECK_S = 0.1


class HttpServer:
    """Serves connections by ``carrier``, and shares those that wait at ``listener`` with the workers of ``values``.

    Without this, the worker that wakes first accepts all connections that a client opens, and the others idle.
    """

    def __init__(self, carrier: HttpCarrier, listener: socket.socket, values: SharedValues, settings: Settings) -> None:
        self._carrier = carrier
        self._listener = listener
        self._tls = open_tls(settings)
        self._workers = [values.facts(row) for row in range(FIRST_WORKER, values.rows)]
        self._most_beginning = max(settings.max_connections, _LEAST_BEGINNING)
        self._handshake_s, self._drain_s = settings.header_timeout_s, settings.drain_timeout_s
        self._beginning: dict[asyncio.Task[None], float] = {}  # connections since when, with TLS until the handshake is over
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """Have ``serve`` end."""
        self._stopping.set()

    async def serve(self) -> None:
        """Serve until ``stop``; then close the listener and answer what was accepted, within the time that a drain has.

        Connections that wait are accepted first: closing the last listener would reset them. Handshakes may end.
        """
        self._loop.add_reader(self._listener, self._accept_share)
        await self._stopping.wait()
        self._loop.remove_reader(self._listener)
        while self._accept(_ACCEPTED_AT_ONCE) or self._beginning:
            ended, _ = await asyncio.wait(self._beginning, timeout=_HANDSHAKE_S)
            if not ended and len(self._beginning) < self._most_beginning:
                break
        self._listener.close()
        limit, connections = self._loop.time() + self._drain_s, self._carrier.connections
        for connection in list(connections):
            connection.shutdown()
        while connections and self._loop.time() < limit:
            await asyncio.sleep(_DRAIN_CHECK_S)
        if connections:
            logger.error("drain timed out connections=%d", len(connections))

    def _accept_share(self) -> None:
        """Accept until this worker has its share; leave the rest to the others, for a moment."""
        waiting = _waiting_connections(self._listener)
        if not waiting:  # another worker was faster, or this system does not say
            self._accept(1)
            return
        own = len(self._carrier.connections) + len(self._beginning)
        alive = [worker for worker in self._workers if worker.process_id]
        connections = sum(worker.connections for worker in alive) + len(self._beginning) + waiting
        share = math.ceil(connections / len(alive))
        left = waiting - self._accept(min(waiting, share - own))
        if left:
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_OTHERS_S, self._accept_rest, left)

    def _accept_rest(self, left: int) -> None:
        """Accept what the others had no time for, then shares again."""
        if not self._stopping.is_set():
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
        with contextlib.suppress(OSError):  # it has left again, or its handshake failed
            timeout_s = self._handshake_s if self._tls else None
            await self._loop.connect_accepted_socket(self._carrier, connection, ssl=self._tls, ssl_handshake_timeout=timeout_s)


def _waiting_connections(listener: socket.socket) -> int:
    """Return how many connections wait to be accepted; 0 where the system does not say, as gVisor."""
    return int(struct.unpack_from("I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24)[0])  # tcpi_unacked
