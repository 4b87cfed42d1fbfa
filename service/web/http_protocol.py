"""Uvicorn's HTTP/1.1 protocol with bounds: connections, header bytes, and the time a client takes to send a request.

Owns: what happens before a request reaches the application, or never does, and which requests reach it directly. Does not
know: routes.

A request that comes whole in one read, as nearly all do, costs no timer; neither does the connection that waits for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import HeadersTooLarge, MalformedRequest, NotReady, RequestTimeout, ServiceError
from service.observability.request_id import make_request_id
from service.web.answer_transport import AnswerTransport, Outbox
from service.web.asgi_exchange import header
from service.web.client_presence import CONNECTION_KEY, Connection
from service.web.direct_exchange import DefaultHeaders, DirectExchange, DirectRoutes
from service.web.problems import MEDIA_TYPE, problem

_MAX_HEADER_BYTES = 65_536
_LAST_REQUEST_S = 0.5  # for what a client has sent, or is about to send, when the server stops


@dataclass(frozen=True)
class ConnectionLimits:
    """``max_connections`` is of one worker; the times count from the first moment in which the client is waited for."""

    max_connections: int
    header_timeout_s: float
    body_timeout_s: float


def bounded_protocol(
    limits: ConnectionLimits, on_refusal: Callable[[str], None], direct: DirectRoutes | None = None
) -> type[HttpToolsProtocol]:
    """Make the protocol class that uvicorn is to use; ``on_refusal`` hears the code of each error that it answers with.

    Requests to ``direct`` go there, unless they want what only ASGI's way has: large bodies, chunks, ``Expect``, pipelining.
    """
    members = {
        "limits": limits,
        "on_refusal": staticmethod(on_refusal),
        "direct": direct,
        "direct_paths": frozenset() if direct is None else direct.paths,
        "default_headers": DefaultHeaders(),
        "outbox": Outbox(),
    }
    return type("BoundedHttpProtocol", (_BoundedHttpProtocol,), members)


class _BoundedHttpProtocol(HttpToolsProtocol):
    limits: ConnectionLimits
    on_refusal: Callable[[str], None]
    direct: DirectRoutes
    direct_paths: frozenset[bytes]
    default_headers: DefaultHeaders
    outbox: Outbox

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._in_headers = True
        self._in_body = False
        self._header_bytes = 0
        self._connection = Connection()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        answers = AnswerTransport(transport, self.outbox)
        self.transport: AnswerTransport = answers  # type: ignore[assignment]  # uvicorn declares its own
        if len(self.connections) > self.limits.max_connections:
            self._refuse(NotReady("too many connections are open here; retry shortly", retry_after_s=1))
        else:
            self._wait_for_client(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client_is_here()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._connection.lose()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > _MAX_HEADER_BYTES:
                self._refuse(HeadersTooLarge(f"the headers are larger than {_MAX_HEADER_BYTES:,} bytes; send fewer"))
            elif self._timer is None:
                self._wait_for_client(self.limits.header_timeout_s)
        elif self._in_body and self._timer is None:
            self._wait_for_client(self.limits.body_timeout_s)

    def on_message_begin(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        super().on_message_begin()
        self.scope[CONNECTION_KEY] = self._connection  # type: ignore[literal-required]  # our own

    def on_headers_complete(self) -> None:
        self._in_headers, self._in_body = False, True
        self._client_is_here()
        path, _, query = self.url.partition(b"?")
        if path in self.direct_paths and self._may_go_directly():
            scope: Any = self.scope  # uvicorn has it as a TypedDict, Starlette as any mapping
            scope.update(method="POST", path=path.decode("ascii"), raw_path=path, query_string=query)
            default_headers = self.default_headers.lines(self.server_state.default_headers)
            cycle: Any = DirectExchange(self, scope, self._connection, self.direct, default_headers)
            self.cycle = cycle
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, DirectExchange):
            self.cycle.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._client_is_here()
        if isinstance(self.cycle, DirectExchange):
            self.cycle.complete()
        else:
            super().on_message_complete()

    def send_whole(self, data: bytes, *, close: bool) -> None:
        """See ``Carrier``."""
        if self.transport.is_closing():
            return
        self.transport.write_whole(data)
        if close:
            self.transport.close()
        self._await_request()

    def drop(self) -> None:
        """See ``Carrier``."""
        self.transport.close()

    def on_response_complete(self) -> None:
        self.transport.flush()
        self._await_request()

    def shutdown(self) -> None:
        """Stop; a connection without a request may have one on its way, which closing at once would answer with a reset."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_LAST_REQUEST_S, super().shutdown)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest("this is not an HTTP/1.1 request; send one"))

    def _await_request(self) -> None:
        """Do as uvicorn does, but keep the timer of an idle connection instead of setting one after every answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = time.monotonic()
            if self._idle_timer is None:
                self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_whether_idle)

    def _may_go_directly(self) -> bool:
        """Whether this request, of which the headers are known, is plain, and no other is under way on the connection."""
        parser = self.parser
        scope: Any = self.scope
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return False
        if parser.should_upgrade() or self.expect_100_continue or self.flow.write_paused or self.root_path:
            return False
        length = header(scope, b"content-length") or b""
        return length.isdigit() and int(length) <= self.direct.max_body_bytes

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _look_whether_idle(self) -> None:
        """Close a connection that has been idle for long enough, or look again when it could be."""
        self._idle_timer = None
        if self._idle_since is None or self.transport.is_closing():
            return
        left_s = self._idle_since + self.timeout_keep_alive - time.monotonic()
        if left_s <= 0:
            self.transport.close()
        else:
            self._idle_timer = self.loop.call_later(left_s, self._look_whether_idle)

    def _wait_for_client(self, timeout_s: float) -> None:
        self._timer = self.loop.call_later(timeout_s, self._client_is_late)

    def _client_is_here(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _client_is_late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        silent = self._in_headers and not self._header_bytes  # since it connected: nobody waits for an answer
        if silent or (self._in_body and self.cycle.response_started):
            self.transport.close()
        else:
            self._refuse(RequestTimeout("the request was not sent in time; send it again, faster or smaller"))

    def _refuse(self, error: ServiceError) -> None:
        """Answer without the application, and close."""
        self.on_refusal(error.code)
        request_id = make_request_id()
        body = orjson.dumps(problem(error, request_id))
        retry = f"retry-after: {error.retry_after_s}\r\n" if error.retry_after_s is not None else ""
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n{retry}"
            f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
