"""How a worker shares the connections that wait with the other workers, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import cast

import pytest

from service.observability.metrics import FIRST_WORKER, Metrics, make_values
from service.processes.http_server import HttpServer
from service.processes.listener import open_listener
from service.settings import load_settings
from service.web.exchange import Entrance
from service.web.http_protocol import HttpCarrier
from tests.support.patience import until


@pytest.mark.parametrize(("the_other_has", "at_once"), [(0, 8), (6, 11), (100, 16)], ids=["even", "fewer", "far fewer"])
def test_a_worker_takes_its_share_of_the_connections_at_once_and_what_nobody_takes_soon_after(
    the_other_has: int, at_once: int
) -> None:
    values = make_values(workers=2)
    other = values.facts(FIRST_WORKER)
    other.process_id, other.connections = 1, the_other_has
    settings = load_settings([])
    carrier = HttpCarrier(cast(Entrance, None), settings, Metrics(values, FIRST_WORKER + 1))  # no request comes

    async def serve(listener: socket.socket) -> None:
        server = HttpServer(carrier, listener, values, settings)
        server._accept_share()
        assert len(server._beginning) == at_once
        await until(lambda: len(carrier.connections) == 16)
        server._loop.remove_reader(listener)
        for connection in list(carrier.connections):
            connection.transport.abort()
        await until(lambda: not carrier.connections)

    with open_listener("127.0.0.1", 0) as listener, contextlib.ExitStack() as clients:
        for _ in range(16):
            clients.enter_context(socket.create_connection(listener.getsockname()))
        asyncio.run(serve(listener))


class _SilentListener(socket.socket):
    """A listener where the system does not say how many connections wait, as gVisor."""

    def getsockopt(self, level: int, option: int, length: int = 0) -> bytes:  # type: ignore[override]  # the form used here
        return bytes(length)


def test_connections_are_accepted_where_the_system_does_not_say_how_many_wait() -> None:
    values = make_values(workers=1)
    settings = load_settings([])
    carrier = HttpCarrier(cast(Entrance, None), settings, Metrics(values, FIRST_WORKER))  # no request comes

    async def serve(listener: socket.socket) -> None:
        server = HttpServer(carrier, listener, values, settings)
        serving = asyncio.create_task(server.serve())
        await until(lambda: len(carrier.connections) == 2)
        server.stop()
        await serving
        assert not carrier.connections

    with contextlib.ExitStack() as stack:
        opened = open_listener("127.0.0.1", 0)
        listener = stack.enter_context(_SilentListener(fileno=opened.detach()))
        listener.setblocking(False)
        for _ in range(2):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        asyncio.run(serve(listener))
