"""Compressed bodies: requests in gzip or deflate, and responses as the client accepts them."""

from __future__ import annotations

import gzip
import zlib
from functools import partial

from service.answers import number
from service.errors import BodyTooLarge, MalformedRequest, UnsupportedMediaType
from service.web.body import in_thread
from service.web.exchange import Exchange, Handler, handle

_EITHER_HEADER = 32 + zlib.MAX_WBITS  # zlib detects its own header and gzip's
_ACCEPTED = (b"gzip", b"x-gzip", b"deflate")
_MAX_MEMBERS = 256  # of gzip (RFC 1952, section 2.2): each takes a copy of those after it
_LEVEL = 1  # responses are small and mostly do not compress


async def decompressed(handler: Handler, encoding: bytes, exchange: Exchange) -> None:
    """Undo the ``Content-Encoding`` of a request, in a thread, and then have ``handler`` answer.

    Raises what ``inflate`` raises, and MemoryBudgetExceeded.
    """
    body = await in_thread(partial(inflate, exchange.body, encoding, exchange.entrance.max_body_bytes), exchange.deadline)
    if not exchange.is_over:  # Python 3.11 loses a cancellation that comes together with the result
        exchange.body = body
        exchange.hold_memory(len(body))
        handle(exchange, handler)


def inflate(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """Undo the ``Content-Encoding`` of a request.

    Raises BodyTooLarge as soon as more than ``max_bytes`` come out, MalformedRequest for damaged data, and
    UnsupportedMediaType for any encoding but gzip, deflate (RFC 9110, section 8.4.1.2, with zlib's header or, as .NET's
    DeflateStream writes it, without) and identity.
    """
    encoding = encoding.strip().lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in _ACCEPTED:
        error = UnsupportedMediaType("this Content-Encoding is not supported; send gzip, deflate, or the body as it is")
        error.headers = ((b"accept-encoding", b"gzip, deflate"),)  # RFC 9110, section 15.5.16
        raise error
    is_deflate = encoding == b"deflate"
    has_header = not is_deflate or body[0] & 15 in (8, 15)  # no stream without one begins so
    pieces: list[bytes] = []
    room = max_bytes + 1
    for _ in range(1 if is_deflate else _MAX_MEMBERS):
        inflater = zlib.decompressobj(_EITHER_HEADER if has_header else -zlib.MAX_WBITS)
        try:
            pieces.append(inflater.decompress(body, room))
        except zlib.error:
            raise MalformedRequest("the compressed body is damaged; send it as its Content-Encoding says") from None
        room -= len(pieces[-1])
        if room == 0:
            raise BodyTooLarge(f"the body is larger than the limit of {max_bytes:,} bytes when decompressed; send fewer images")
        body = inflater.unused_data
        if not body:
            break
    if body or not inflater.eof:
        raise MalformedRequest("the compressed body is cut short, or something follows it; send it as one complete stream")
    return b"".join(pieces)


def compress(body: bytes, accept_encoding: bytes | None) -> tuple[bytes, bytes | None]:
    """Compress a response by the ``Accept-Encoding`` of its request; return it and its ``Content-Encoding``, None for none."""
    chosen = preferred_encoding(accept_encoding, b"gzip", b"deflate")
    if chosen == b"gzip":
        return gzip.compress(body, _LEVEL, mtime=0), chosen
    if chosen == b"deflate":
        return zlib.compress(body, _LEVEL), chosen
    return body, None


def preferred_encoding(accept_encoding: bytes | None, *offered: bytes) -> bytes:
    """Return which of identity and ``offered`` is preferred: as for Triton, the first one of the highest weight."""
    chosen, best = b"identity", 0.0
    for option in (accept_encoding or b"").split(b","):
        name, _, parameter = option.partition(b";")
        name, weight = name.strip().lower(), _weight(parameter)
        if name in (b"identity", *offered) and weight > best:
            chosen, best = name, weight
    return chosen


def _weight(parameter: bytes) -> float:
    """Weight of ``q=0.5``; 0 where it cannot be read."""
    name, _, value = parameter.strip().partition(b"=")
    if not name:
        return 1.0
    return (number(value.decode("latin-1")) or 0.0) if name.strip().lower() == b"q" else 0.0
