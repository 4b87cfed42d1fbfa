"""Uvicorn as a child of the supervisor runs it: on a listener it is given, behind our protocol, without signal handlers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn

from service.web.http_protocol import HttpCarrier


class HttpServer(uvicorn.Server):
    """Serves connections by ``carrier``; ``options`` are further ones of ``uvicorn.Config``."""

    def __init__(self, carrier: HttpCarrier, **options: Any) -> None:
        config = uvicorn.Config(
            _no_application,
            http=carrier,  # type: ignore[arg-type]  # called as a protocol class is
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
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


async def _no_application(scope: object, receive: object, send: object) -> None:
    """Stand where uvicorn wants an ASGI application, which ``HttpCarrier`` does not call."""
