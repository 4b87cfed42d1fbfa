"""Uvicorn as a child of the supervisor runs it: on a listener it is given, behind our protocol, without signal handlers.

Owns: what every such server has in common, and that it ends with its supervisor. Does not know: applications, what stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.processes.process_state import supervisor_is_gone
from service.web.direct_exchange import DirectRoutes
from service.web.http_protocol import ConnectionLimits, bounded_protocol

_SUPERVISOR_CHECK_S = 1.0


class HttpServer(uvicorn.Server):
    """Serves ``app`` within ``limits``; ``options`` are further ones of ``uvicorn.Config``.

    ``on_refusal`` hears the code of each error that is answered before the application sees the request; ``direct`` are the
    routes that ``app`` answers without ASGI.
    """

    def __init__(
        self,
        app: FastAPI,
        limits: ConnectionLimits,
        on_refusal: Callable[[str], None],
        direct: DirectRoutes | None = None,
        **options: Any,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=bounded_protocol(limits, on_refusal, direct),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            **options,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the process has handlers of its own, or none."""
        yield

    def stop(self) -> None:
        """Stop accepting, answer what was accepted, end."""
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped, or until the supervisor is gone: nobody would start or stop this process any more."""
        self._stop_with_supervisor()
        await super().serve(sockets)

    def _stop_with_supervisor(self) -> None:
        if supervisor_is_gone():
            self.stop()
        else:
            asyncio.get_running_loop().call_later(_SUPERVISOR_CHECK_S, self._stop_with_supervisor)
