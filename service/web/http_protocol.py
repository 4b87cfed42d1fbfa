"""HTTP/1.1 on one connection, with bounds: connections, bytes of headers and trailers, and the time a client may take.

httptools parses; requests are answered in the order in which they came. To stop, the server accepts no more, calls ``shutdown``
of each of the ``connections``, and waits for them to end.

A connection is in one of these phases, most of which have a time limit:

    silent → headers → body → busy → idle → headers ...        lingering: refused; what still comes is dropped
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import time
from collections import deque
from email.utils import formatdate
from functools import lru_cache
from typing import Literal, cast

import httptools

from service.errors import HeadersTooLarge, MalformedRequest, NotReady, RequestTimeout, ServiceError
from service.observability.metrics import REFUSALS, Metrics
from service.observability.request_record import make_request_id
from service.settings import Settings
from service.web.exchange import Entrance, Exchange, Reply, error_reply
from service.web.request_head import make_scope

logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 65_536
_TOO_LARGE = f"the headers are larger than {_MAX_HEADER_BYTES:,} bytes; send fewer"
_MAX_LINGERING_BYTES = 2**24
_LINGERING_S = 1.0
_TIMED_BYTES = 2**20  # of a body: for each, the client has its time again
_MOMENT_S = 0.5  # for what a client has sent, or is about to send, when the connection ends; between two interim responses
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Phase = Literal["silent", "headers", "body", "busy", "idle", "lingering"]


@lru_cache(1)
def _date_line(second: int) -> bytes:
    return b"date: %b\r\n" % formatdate(second, usegmt=True).encode()


class HttpCarrier:
    """What the connections of one server share; makes the protocol of each."""

    def __init__(self, entrance: Entrance, settings: Settings, metrics: Metrics) -> None:
        """Have ``entrance`` answer; errors that are answered without it are counted in ``metrics``."""
        self.entrance = entrance
        self.max_connections = settings.max_connections
        # Each time counts from the moment at which the client is first waited for.
        head_s, idle_s = settings.header_timeout_s, settings.keep_alive_s
        self.timeouts: dict[Phase, float] = {"silent": head_s, "headers": head_s, "body": settings.body_timeout_s}
        self.timeouts |= {"idle": idle_s, "lingering": _LINGERING_S}
        self.metrics = metrics
        self.connections: set[HttpProtocol] = set()

    def __call__(self) -> HttpProtocol:
        """Make the protocol of a connection."""
        return HttpProtocol(self)


class HttpProtocol(asyncio.Protocol):
    """One connection; see the module."""

    transport: asyncio.Transport

    def __init__(self, carrier: HttpCarrier) -> None:
        self._carrier = carrier
        self._loop, self._parser = asyncio.get_running_loop(), httptools.HttpRequestParser(self)
        self._exchanges: deque[Exchange] = deque()  # in order; the first one is worked on, the last may still be arriving
        self._no_place: ServiceError | None = None  # answers all but health
        self._last_error: ServiceError | None = None  # follows the answers that are on their way
        self._phase: Phase = "silent"
        self._timed_phase: Phase | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = self._due = math.inf
        self._unread_timer: asyncio.TimerHandle | None = None
        self._unparsed = self._read = 0  # bytes since headers or a piece of a body were complete, at most; that came last
        self._is_stopping = self._may_open = False
        self._url, self._headers = b"", list[tuple[bytes, bytes]]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._carrier.connections.add(self)
        self._carrier.metrics.facts.connections = len(self._carrier.connections)
        peer = transport.get_extra_info("peername")
        self._client = peer[0].removeprefix("::ffff:") if isinstance(peer, tuple) else None
        self._scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        fullness = len(self._carrier.connections) / self._carrier.max_connections
        if fullness > 1:  # it may ask for health, for a moment
            self._no_place = NotReady("too many connections are open here; retry shortly", retry_after_s=1)
            if fullness > 2:
                self._refuse(self._no_place)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._carrier.connections.discard(self)
        self._carrier.metrics.facts.connections = len(self._carrier.connections)
        for timer in (self._timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        while self._exchanges:
            self._exchanges.popleft().leave()

    def data_received(self, data: bytes) -> None:
        self._may_open = True
        while data:  # in pieces, so that more of headers or trailers than one is seen before it is parsed
            data = self._parse(data[:_MAX_HEADER_BYTES]) + data[_MAX_HEADER_BYTES:]

    def _parse(self, data: bytes) -> bytes:
        """Return what is to be parsed again: a request that asked for an upgrade, and what follows it."""
        self._read = len(data)
        self._unparsed += self._read
        if self._phase == "lingering" or self.transport.is_closing():
            if self._unparsed > _MAX_LINGERING_BYTES:
                self.transport.abort()
            return b""
        again = b""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            again = self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__  # what was raised in one of the callbacks below
            if not isinstance(cause, ServiceError):
                if isinstance(error, httptools.HttpParserCallbackError):
                    logger.error("request not handled", exc_info=error)
                cause = MalformedRequest("this is not an HTTP/1.1 request; send one")
            self._refuse(cause)
        if self._unparsed > _MAX_HEADER_BYTES and self._phase in ("headers", "body"):
            self._refuse(HeadersTooLarge(_TOO_LARGE))
        if self._phase is not self._timed_phase:
            self._timed_phase = self._phase
            if self._phase != "busy":
                self._set_timer()
        return again

    def eof_received(self) -> bool:
        """Answer the requests that are complete: the client may only have ended its own side (RFC 9112, section 9.6)."""
        if self._phase == "body":
            self._exchanges.pop().leave()
        if not self._exchanges or self._phase == "lingering" or self._scheme == "https":  # TLS has no such half
            return False
        self._phase = "busy"
        self._exchanges[-1].keep_alive = False
        self._loop.call_later(_MOMENT_S, self._probe)
        return True

    def _probe(self) -> None:
        """Send an interim response: a client that has gone altogether resets it, and the next one fails."""
        if self._exchanges and not self.transport.is_closing() and self._parser.get_http_version() != "1.0":
            self.transport.write(_CONTINUE)
            self._loop.call_later(_MOMENT_S, self._probe)

    def pause_writing(self) -> None:
        """Read nothing more from a client that does not read: it would be answered from memory."""
        self.transport.pause_reading()
        self._unread_timer = self._loop.call_later(self._carrier.timeouts["body"], self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        if len(self._exchanges) <= 1 and self._last_error is None and not self.transport.is_closing():
            self.transport.resume_reading()
        self._open_next()

    def shutdown(self) -> None:
        """Close, after the requests at hand; one that is on its way is answered, which closing at once would reset."""
        self._is_stopping = True
        if not self._exchanges:
            self._loop.call_later(_MOMENT_S, self._close_unless_busy)

    def on_message_begin(self) -> None:
        self._phase, self._url, self._headers = "headers", b"", []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        if self._unparsed > _MAX_HEADER_BYTES:
            self._require_few_headers()
        self._unparsed = self._read
        if (parser := self._parser).should_upgrade():
            return
        headers, self._headers = self._headers, []  # what comes now are trailers
        version = parser.get_http_version()
        scope = make_scope(parser.get_method(), self._url, version, headers, self._client, self._scheme)
        exchange = Exchange(scope, self._carrier.entrance, int(scope.header(b"content-length") or 0), self._send)
        self._phase, self._untimed = "body", 0
        exchange.keep_alive = parser.should_keep_alive() and version == "1.1"
        self._exchanges.append(exchange)
        if self._may_open and len(self._exchanges) == 1 and not self._unread_timer:
            self._may_open = False  # not another one in this iteration of the event loop
            self._open(exchange)
        else:
            self.transport.pause_reading()
            if len(self._exchanges) == 1:
                self._loop.call_soon(self._open_next)

    def _require_few_headers(self) -> None:
        if len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers) > _MAX_HEADER_BYTES:
            raise HeadersTooLarge(_TOO_LARGE)

    def on_body(self, body: bytes) -> None:
        self._unparsed = (self._read if self._unparsed > self._read else self._unparsed) - len(body)
        exchange = self._exchanges[-1]
        self._untimed += 0 if exchange.is_over else len(body)
        if self._untimed >= _TIMED_BYTES:
            self._untimed, self._timed_phase = 0, None
        exchange.receive(body)

    def on_message_complete(self) -> None:
        if self._phase != "body":  # of a request that asks for an upgrade
            return
        if self._unparsed > _MAX_HEADER_BYTES:
            self._require_few_headers()
        self._unparsed = 0
        self._phase = "busy"
        exchange = self._exchanges[-1]
        is_answered = exchange.is_over
        exchange.complete()
        if is_answered:
            self._finish(exchange)

    def _send(self, exchange: Exchange, reply: Reply) -> None:
        """Write the answer to the first of the exchanges."""
        if not self.transport.is_closing():
            keep_alive = exchange.keep_alive and not self._is_stopping
            self._write(reply, keep_alive=keep_alive, is_head=exchange.scope.method == "HEAD")
        if exchange.is_complete:
            self._finish(exchange)

    def _write(self, reply: Reply, *, keep_alive: bool, is_head: bool = False) -> None:
        date = _date_line(int(time.time()))
        self.transport.write(reply.encode(date, keep_alive=keep_alive, is_head=is_head))

    def _finish(self, exchange: Exchange) -> None:
        """Go on after an exchange of which both request and answer are complete."""
        self._exchanges.popleft()
        if not exchange.keep_alive or self._is_stopping:
            self.transport.close()
        elif self._exchanges:
            self._loop.call_soon(self._open_next)
        elif self._last_error is not None:
            self._refuse(self._last_error)
        elif self._phase == "busy":
            self._phase = "idle"
            self._set_timer()

    def _open_next(self) -> None:
        """Go on with a request that was sent before the one before it was answered, once that answer is on its way."""
        if not self._exchanges or self._exchanges[0].is_open or self._unread_timer or self.transport.is_closing():
            return
        if len(self._exchanges) == 1:
            self.transport.resume_reading()
        self._open(self._exchanges[0])

    def _open(self, exchange: Exchange) -> None:
        """Let a request in; answer ``Expect: 100-continue``, unless it was refused: then no body can follow."""
        exchange.open()
        if self._no_place is not None and not exchange.scope.path.startswith(("/health", "/v2/health/")):
            exchange.keep_alive = False
            exchange.refuse(self._no_place)
        waits = (exchange.scope.header(b"expect") or b"").lower() == b"100-continue"
        if exchange.is_over and not exchange.is_complete and (waits or self._no_place):
            self._hang_up()
        elif waits and not exchange.is_complete:
            self.transport.write(_CONTINUE)

    def _refuse(self, error: ServiceError) -> None:
        """Answer what cannot be read any further, after the answers that are on their way, and hang up."""
        if self.transport.is_closing():
            return
        arriving = self._exchanges.pop() if self._phase == "body" else None
        if arriving is not None and not arriving.is_open:
            arriving.leave()
            arriving = None
        if self._exchanges:
            self._last_error = error
            self.transport.pause_reading()
            self._phase = "busy"
            return
        if arriving is None:
            self._carrier.metrics.add(REFUSALS, error.code)
            reply = error_reply(error, request_id := make_request_id())
            reply.headers.append((b"x-request-id", request_id.encode()))
            self._write(reply, keep_alive=False, is_head=self._parser.get_method() == b"HEAD")
        else:
            arriving.keep_alive = False
            arriving.refuse(error)  # unless it is answered already
        self._hang_up()

    def _hang_up(self) -> None:
        """Close, but read on for a moment: a reset would reach the client before the answer does."""
        self._phase, self._unparsed = "lingering", 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer()

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return the request at hand without ``Upgrade``, which a server may ignore (RFC 9110, section 7.8), and the rest."""
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(MalformedRequest("this is no proxy; send a request for a path"))
            return b""
        headers = [b"%s: %s" % pair for pair in self._headers if pair[0] != b"upgrade"]
        self._parser, self._phase, self._unparsed = httptools.HttpRequestParser(self), "idle", 0
        return b"\r\n".join((b"%s %s HTTP/%s" % (method, self._url, version), *headers, b"", rest))

    def _set_timer(self) -> None:
        """Bound the phase that has just begun; an idle connection reuses its timer instead of setting one per request."""
        self._due = self._loop.time() + (self._carrier.timeouts[self._phase] if self._no_place is None else _LINGERING_S)
        if self._due < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at, self._timer = self._due, self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer, self._timer_at = None, math.inf
        if self._due > self._loop.time():
            self._timer_at, self._timer = self._due, self._loop.call_at(self._due, self._ring)
        elif self._phase in ("headers", "body"):
            self._refuse(RequestTimeout("the request was not sent in time; send it again, faster or smaller"))
        elif self._phase == "lingering":
            self.transport.abort()
        elif self._phase != "busy":  # nobody waits for an answer
            self.shutdown()

    def _close_unless_busy(self) -> None:
        if self._phase not in ("silent", "idle") or self.transport.is_closing():
            return
        arrived = select.poll()
        arrived.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        if arrived.poll(0) and not self._unread_timer:  # a request that is not read yet
            self._loop.call_soon(self._close_unless_busy)
        else:
            self.transport.close()
