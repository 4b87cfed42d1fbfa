"""Exchanges under any ASGI server: Ray Serve, Starlette's test client."""

from __future__ import annotations

import asyncio

from starlette.routing import Router
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from service.engine.interface import settle
from service.observability.request_record import Scope
from service.web.exchange import Entrance, Exchange, Reply, without_prefix


class AsgiCarrier(Router):
    """An ASGI application for HTTP that has ``entrance`` answer; Starlette does the rest that ASGI asks for."""

    def __init__(self, entrance: Entrance) -> None:
        super().__init__(redirect_slashes=False)
        self._entrance = entrance

    async def not_found(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer one request, for which Starlette has no route; accept no WebSocket."""
        if scope["type"] != "http":
            await super().not_found(scope, receive, send)
            return
        answered: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        client = scope.get("client")
        own = Scope(
            scope["method"],
            without_prefix(scope["path"], scope.get("root_path", "").rstrip("/")),
            scope["query_string"],
            list(scope["headers"]),
            client[0] if client else None,
            scope.get("scheme", "http"),
        )
        length = own.header(b"content-length") or b""
        exchange = Exchange(
            own, self._entrance, int(length[:19]) if length.isdigit() else 0, lambda _, reply: settle(answered, reply)
        )
        exchange.open()
        reading = asyncio.ensure_future(_read(exchange, receive))
        reading.add_done_callback(lambda _: settle(answered, None))
        try:
            reply = await answered
        finally:
            reading.cancel()
            exchange.leave()
        if reply is None:
            return
        headers = reply.framed(keep_alive=exchange.keep_alive)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if own.method == "HEAD" else reply.body})


async def _read(exchange: Exchange, receive: Receive) -> None:
    """Hand over the body, then return when the client leaves."""
    while (message := await receive())["type"] != "http.disconnect":
        exchange.receive(message.get("body", b""))
        if not message.get("more_body", False):
            exchange.complete()
    exchange.leave()
