"""What a request is answered with."""

from __future__ import annotations

from dataclasses import dataclass, field

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Reply:
    """A whole answer; the carrier adds its length, and ``content_type`` where it is not empty, to ``headers``."""

    body: bytes
    headers: Headers = field(default_factory=list)
    content_type: bytes = b"application/json"
    status: int = 200
