"""What a request is answered with."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

Headers = list[tuple[bytes, bytes]]

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_WITHOUT_LENGTH = (204, 304)


@dataclass(slots=True)
class Reply:
    """A whole answer; the carrier adds its length, and ``content_type`` where it is not empty, to ``headers``."""

    body: bytes
    headers: Headers = field(default_factory=list)
    content_type: bytes = b"application/json"
    status: int = 200

    def encode(self, default_lines: bytes, *, keep_alive: bool, is_head: bool) -> bytes:
        """Return the answer in HTTP/1.1; ``default_lines`` are header lines that every answer has."""
        parts = [_STATUS_LINES.get(self.status) or b"HTTP/1.1 %d \r\n" % self.status, default_lines]
        for name, value in self.headers:
            parts += (name, b": ", value, b"\r\n")
        if self.content_type:
            parts += (b"content-type: ", self.content_type, b"\r\n")
        if self.status not in _WITHOUT_LENGTH:
            parts.append(b"content-length: %d\r\n" % len(self.body))
        parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        if not is_head:
            parts.append(self.body)
        return b"".join(parts)
