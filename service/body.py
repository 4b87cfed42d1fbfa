"""Request bodies: read within a limit, cut into the parts of a form, and bytes in base64 within them.

Owns: byte limits, multipart parsing, base64. Does not know: what the parts mean.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive, Scope

from service.errors import BodyTooLarge, MalformedRequest


class ClientLeft(Exception):
    """The connection was closed before the request was complete; there is nobody to answer."""


@dataclass(slots=True)
class Part:
    """One part of a form: ``data`` are its bytes, ``filename`` what the client called the file, if anything."""

    name: str
    filename: str | None
    data: bytes


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


def parse_form(body: bytes, content_type: bytes, *, max_parts: int) -> list[Part]:
    """Cut a ``multipart/form-data`` body into its parts; raise MalformedRequest when it is broken or has too many."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedRequest("the Content-Type has no boundary; let your HTTP client set it")
    collector = _Collector(max_parts)
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]  # the TypedDict of all callbacks
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise MalformedRequest("the multipart body is broken; send it complete and with the boundary it declares") from error
    if not collector.ended:
        raise MalformedRequest("the multipart body is cut short; send it complete, with its closing boundary")
    return collector.parts


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


@dataclass(slots=True)
class _Collector:
    """Takes the parser's callbacks; the data of a part mostly comes in one piece."""

    max_parts: int
    parts: list[Part] = field(default_factory=list)
    ended: bool = False
    _name: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    _data: list[bytes] = field(default_factory=list)

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        if len(self.parts) == self.max_parts:
            raise MalformedRequest(f"the form has more than {self.max_parts} parts; send fewer in one request")
        self._disposition = b""
        self._data = []

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _on_part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise MalformedRequest("a part of the form has no name; the image's part is called 'file'")
        filename = options.get(b"filename")
        self.parts.append(
            Part(
                options[b"name"].decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
                self._data[0] if len(self._data) == 1 else b"".join(self._data),
            )
        )

    def _on_end(self) -> None:
        self.ended = True
