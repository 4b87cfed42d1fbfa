"""One HTTP request and its one answer, whatever carries it; no I/O.

A carrier makes an exchange when a request's headers are complete, hands it the body, and sends what it is answered with:
``web.http_protocol`` for connections of our own, ``web.asgi_exchange`` for other servers.

    carrier:  Exchange(...) → open() → receive(chunk)... → complete() ........ send(reply)
    entry:                    open: record, key, rate limit → route: deadline, handler
    handler:                                                         answer(reply) or refuse(error)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import InitVar, dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from service.errors import BodyTooLarge, ServiceError
from service.observability.request_record import RequestRecord, Scope
from service.web.memory_budget import MemoryBudget

logger = logging.getLogger(__name__)

_UNCOUNTED_BYTES = 16_384  # a body of this size or less is not worth counting: the headers may be larger

Headers = list[tuple[bytes, bytes]]

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_WITHOUT_LENGTH = (204, 304)  # statuses whose answer has no Content-Length
PROBLEM_TYPE = "application/problem+json"


@dataclass(slots=True)
class Reply:
    """A whole answer; the carrier adds its length, and ``content_type`` where it is not empty, to ``headers``."""

    body: bytes
    headers: Headers = field(default_factory=list)
    content_type: bytes = b"application/json"
    status: int = 200

    def framed(self, *, keep_alive: bool) -> Headers:
        """Return the headers, to which those are added that say what the body is and what follows it."""
        headers = self.headers
        if self.content_type:
            headers.append((b"content-type", self.content_type))
        if self.status not in _WITHOUT_LENGTH:
            headers.append((b"content-length", b"%d" % len(self.body)))
        if not keep_alive:
            headers.append((b"connection", b"close"))
        return headers

    def encode(self, date_line: bytes, *, keep_alive: bool, is_head: bool) -> bytes:
        """Return the answer in HTTP/1.1; ``date_line`` is the header line that every answer has."""
        lines = [b"%s: %s\r\n" % pair for pair in self.framed(keep_alive=keep_alive)]
        return b"".join((_STATUS_LINES[self.status], date_line, *lines, b"\r\n", b"" if is_head else self.body))


class Entrance(Protocol):
    """What every exchange passes; bodies have at most ``max_body_bytes``, and all but small ones count in ``memory``."""

    max_body_bytes: int
    memory: MemoryBudget

    def open(self, exchange: Exchange) -> None:
        """Begin the record, and refuse or ``release`` the exchange, now or later."""

    def route(self, exchange: Exchange) -> None:
        """Have an exchange that is released and complete answered, now or later; raise nothing."""

    def close(self, exchange: Exchange, reply: Reply | None) -> None:
        """Report the exchange, and add to the headers of ``reply``, which is None when the client has left."""


@dataclass(slots=True, eq=False)
class Exchange:
    """A request that is answered once, by ``answer`` or ``refuse``, unless its client leaves first.

    ``length`` is that of the body, in bytes, 0 where none is declared; ``_send`` writes the answer. ``deadline`` is a
    ``time.monotonic()`` in seconds, set before the request is routed; ``Entrance.open`` sets ``record``. ``on_left`` is called
    when the client leaves. The carrier closes the connection after an answer without ``keep_alive``.
    """

    scope: Scope
    entrance: Entrance
    length: InitVar[int]
    _send: Callable[[Exchange, Reply], None]
    record: RequestRecord = field(init=False)
    body: bytes = field(default=b"", init=False)
    deadline: float = field(default=0.0, init=False)
    keep_alive: bool = field(default=True, init=False)
    on_left: Callable[[], object] | None = field(default=None, init=False)
    is_open: bool = field(default=False, init=False)
    is_released: bool = field(default=False, init=False)
    is_complete: bool = field(default=False, init=False)
    is_over: bool = field(default=False, init=False)
    _chunks: bytes | bytearray = field(default=b"", init=False)
    _held_bytes: int = field(default=0, init=False)
    _refusal: ServiceError | None = field(default=None, init=False)

    def __post_init__(self, length: int) -> None:
        if length > self.entrance.max_body_bytes:
            self._refusal = _too_large(self.entrance.max_body_bytes)

    def open(self) -> None:
        """Let the request in, now that all requests before it on its connection are answered."""
        self.is_open = True
        self.entrance.open(self)

    def release(self) -> None:
        """Admit the request: it is routed once its body is complete."""
        self.is_released = True
        self._advance()

    def receive(self, chunk: bytes) -> None:
        """Add to the body; what comes after the answer or the reason for a refusal is dropped."""
        if self.is_over or self._refusal is not None:
            return
        if not self._chunks:
            self._chunks = chunk
        else:
            if isinstance(self._chunks, bytes):
                self._chunks = bytearray(self._chunks)
            self._chunks += chunk
        size, limit = len(self._chunks), self.entrance.max_body_bytes
        try:
            if size > limit:
                raise _too_large(limit)
            if size > _UNCOUNTED_BYTES:
                self.hold_memory(size)
        except ServiceError as error:
            self._refusal = error.with_traceback(None)  # whose frames hold the chunk
            self._drop_body()
            self._advance()

    def hold_memory(self, count: int) -> None:
        """Count ``count`` bytes in the memory budget until the end; raise MemoryBudgetExceeded where fewer are left."""
        if count > self._held_bytes:
            self.entrance.memory.acquire(count - self._held_bytes)
            self._held_bytes = count

    def complete(self) -> None:
        """Note that the whole body has come."""
        self.is_complete = True
        self._advance()

    def answer(self, reply: Reply) -> None:
        """Send the answer, unless the client has left."""
        if not self.is_over:
            self._end(reply)
            self._send(self, reply)

    def refuse(self, error: Exception) -> None:
        """Answer with an error; one of no kind that we know is logged, and its text is not sent."""
        if self.is_over:
            return
        if not isinstance(error, ServiceError):
            logger.error("request failed path=%s request_id=%s", self.scope.path, self.scope.request_id, exc_info=error)
            error = ServiceError("something went wrong here; retry, and report it with the request id if it stays")
        error.__traceback__ = error.__context__ = error.__cause__ = None  # whose frames hold the body, and often the error
        self.record.refusals.append(error.code)
        self.answer(error_reply(error, self.scope.request_id, self.scope.path))

    def leave(self) -> None:
        """End without an answer: the client has gone."""
        if not self.is_open:
            self._drop_body()
        elif not self.is_over:
            on_left = self.on_left
            self._end(None)
            if on_left is not None:
                on_left()

    def _advance(self) -> None:
        if not self.is_released or self.is_over:
            return
        if self._refusal is not None:
            self.refuse(self._refusal)
        elif self.is_complete:
            self.body = bytes(self._chunks)
            self._chunks = b""
            self.entrance.route(self)

    def _end(self, reply: Reply | None) -> None:
        self.is_over = True
        self.on_left = None
        self._drop_body()
        self.entrance.close(self, reply)

    def _drop_body(self) -> None:
        self.body = self._chunks = b""
        if self._held_bytes:
            self.entrance.memory.release(self._held_bytes)
            self._held_bytes = 0


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the limit of {limit:,} bytes; send a smaller image, or fewer")


Handler = Callable[[Exchange], Reply | Coroutine[Any, Any, Reply | None] | None]
"""Returns the answer, or a coroutine that does; None where the exchange is answered by other means."""


def handle(exchange: Exchange, handler: Handler) -> None:
    """Answer with what ``handler`` returns; a coroutine runs in a task, which is cancelled when the client leaves."""
    made = handler(exchange)
    if isinstance(made, Reply):
        exchange.answer(made)
    elif made is not None:
        task = asyncio.get_running_loop().create_task(made)
        exchange.on_left = task.cancel
        task.add_done_callback(partial(_finish, exchange))


def _finish(exchange: Exchange, task: asyncio.Task[Reply | None]) -> None:
    if task.cancelled():
        exchange.leave()
    elif (error := task.exception()) is not None:
        assert isinstance(error, Exception), "a task ends with no other kind"
        exchange.refuse(error)
    elif (reply := task.result()) is not None:
        exchange.answer(reply)


def without_prefix(path: str, root_path: str) -> str:
    """Return ``path`` as it is below ``root_path``, which ends without a slash; one that is not below it as it is."""
    return path[len(root_path) :] if path.startswith(f"{root_path}/") else path


def problem(error: ServiceError, request_id: str) -> dict[str, str | int]:
    """Members of the problem, as in RFC 9457, section 3.1, with ``code`` and ``request_id``."""
    return {
        "type": f"urn:problem:{error.code.replace('_', '-')}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request_id,
    }


def error_reply(error: ServiceError, request_id: str, path: str = "") -> Reply:
    """Make the answer, in the dialect of the request's path, with the headers that belong to its status.

    The Open Inference Protocol has an error object of its own, and Hugging Face's clients show ``error`` and nothing else.
    """
    headers: Headers = [*error.headers]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if path == "/v2" or path.startswith("/v2/"):
        return Reply(orjson.dumps({"error": error.detail}), headers, b"application/json", error.status)
    content = problem(error, request_id)
    if path == "/hf":
        content["error"] = error.detail
    return Reply(orjson.dumps(content), headers, PROBLEM_TYPE.encode(), error.status)
