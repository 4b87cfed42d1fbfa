"""A request and its answer without a task or an ASGI message between them, for the requests that are nearly all of the load.

Owns: the answer's bytes. Does not know: which requests go this way (``service.web.http_protocol``), what is asked and answered
(``service.web.entry``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Protocol

from starlette.types import Scope

from service.web.client_presence import Connection

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_Headers = Iterable[tuple[bytes, bytes]]


class DirectRoutes(Protocol):
    """What an application answers directly: bodies of at most ``max_body_bytes`` to ``paths``."""

    paths: frozenset[bytes]
    max_body_bytes: int

    def begin(self, exchange: DirectExchange) -> Callable[[bytes], None]:
        """Take a POST to one of ``paths`` whose headers are known; give what is to be called with its complete body.

        After that it is answered once, unless its client leaves first.
        """


class Carrier(Protocol):
    """The connection's side: takes the bytes of a whole answer, and hears that it was one."""

    def send_whole(self, data: bytes, *, close: bool) -> None:
        """Write ``data``, and close the connection after it where asked."""

    def drop(self) -> None:
        """Close the connection without an answer."""


class DirectExchange:
    """Stands on its connection where uvicorn's protocol has its ``RequestResponseCycle``, whose attributes it looks at.

    ``body`` grows until ``complete`` is called; ``keep_alive`` may turn False until the answer.
    """

    __slots__ = (
        "_carrier",
        "_default_headers",
        "_on_complete",
        "body",
        "connection",
        "disconnected",
        "keep_alive",
        "response_complete",
        "scope",
    )

    response_started = False  # what is answered here is answered whole

    def __init__(
        self, carrier: Carrier, scope: Scope, connection: Connection, routes: DirectRoutes, default_headers: bytes
    ) -> None:
        """Take the request of ``scope`` to one of ``routes``; ``default_headers`` are lines that every answer has."""
        self._carrier = carrier
        self._default_headers = default_headers
        self.scope = scope
        self.connection = connection
        self.body = b""
        self.keep_alive = True
        self.response_complete = False
        self.disconnected = False
        self._on_complete: Callable[[bytes], None] | None = routes.begin(self)

    @property
    def message_event(self) -> DirectExchange:
        """What uvicorn would wake a waiting task by; here none waits."""
        return self

    def set(self) -> None:
        """See ``message_event``."""

    def complete(self) -> None:
        """Have the request, whose body is complete, worked on; what is not needed any more is let go."""
        on_complete, self._on_complete = self._on_complete, None
        body, self.body = self.body, b""
        if on_complete is not None:
            on_complete(body)

    def answer(self, status: int, headers: _Headers, body: bytes) -> None:
        """Send the answer, once."""
        parts = [_STATUS_LINES[status], self._default_headers]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n", body) if self.keep_alive else (b"connection: close\r\n\r\n", body)
        self.response_complete = True
        self._carrier.send_whole(b"".join(parts), close=not self.keep_alive)

    def fail(self) -> None:
        """End without an answer."""
        self.response_complete = True
        self._carrier.drop()


class DefaultHeaders:
    """Header lines from pairs that are replaced, as a list, about once a second."""

    def __init__(self) -> None:
        self._pairs: Sequence[tuple[bytes, bytes]] | None = None
        self._lines = b""

    def lines(self, pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Give the lines for ``pairs``."""
        if pairs is not self._pairs:
            self._pairs = pairs
            self._lines = b"".join(b"%s: %s\r\n" % pair for pair in pairs)
        return self._lines
