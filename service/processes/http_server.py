"""Uvicorn as a child of the supervisor runs it: on a listener it is given, behind our protocol, without signal handlers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.web.direct_exchange import DirectRoutes
from service.web.http_protocol import ConnectionLimits, bounded_protocol


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
