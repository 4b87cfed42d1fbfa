"""Request bodies: read within a limit; headers; bytes in base64.

Owns: byte limits, base64. Does not know: forms, what the bytes mean.
"""

from __future__ import annotations

import base64
import binascii

from starlette.types import Receive, Scope

from service.errors import BodyTooLarge, MalformedRequest
from service.web.client_presence import ClientLeft


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Read the whole body; raise BodyTooLarge as soon as it is known to exceed ``max_bytes``, and ClientLeft."""
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    chunks = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunks += message.get("body", b"")
        if len(chunks) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(chunks)
        message = await receive()


def header(scope: Scope, name: bytes) -> bytes | None:
    """Give the first header called ``name`` (lower case), or None."""
    for key, value in scope["headers"]:
        if key == name:
            return value  # type: ignore[no-any-return]  # ASGI says bytes
    return None


def decode_base64(text: str, name: str) -> bytes:
    """Decode base64, or a ``data:`` URI of it; raise MalformedRequest about ``name`` for all else, any other URL included."""
    if text[:5].lower() == "data:":
        options, comma, text = text.partition(",")
        if not comma or not options.lower().endswith(";base64"):
            raise MalformedRequest(f"the data: URI in {name} is not in base64; send data:image/jpeg;base64,...")
    elif "://" in text[:32]:
        raise MalformedRequest("URLs are not fetched; send the image itself in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRequest(f"{name} is not valid base64") from None


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the limit of {max_bytes:,} bytes; send a smaller image, or fewer")
