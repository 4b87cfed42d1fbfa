"""One HTTP/1.1 connection of a client that wants to know exactly what became of each request.

It never opens itself again behind its user's back, as HTTP libraries do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


class NoAnswer(Exception):
    """A request was sent, and its answer never came whole; the message says what came instead."""


@dataclass(frozen=True)
class HttpAnswer:
    """``headers`` by their names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class HttpConnection:
    """Made by ``open``; ``local_port`` tells it from every other one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._closing = False
        self.local_port = int(writer.get_extra_info("sockname")[1])

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect; raise OSError where nobody accepts."""
        parts = urlsplit(url)
        trusting = ssl._create_unverified_context() if parts.scheme == "https" else None  # its certificate is of its own making
        return cls(*await asyncio.open_connection(parts.hostname, parts.port, ssl=trusting))

    @property
    def is_open(self) -> bool:
        """Whether a request may be sent: neither side has said that it closes."""
        return not (self._closing or self._reader.at_eof() or self._writer.is_closing())

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)

    def end(self) -> None:
        """Send no more, and read on."""
        self._writer.write_eof()

    async def exchange(self, request: bytes, *, patience_s: float) -> HttpAnswer:
        """Send a whole request and read its answer; raise NoAnswer for a reset, a cut answer, or none in ``patience_s``."""
        self.send(request)
        return await self.answer(patience_s=patience_s)

    async def answer(self, *, patience_s: float) -> HttpAnswer:
        """Read one answer; errors as in ``exchange``."""
        try:
            async with asyncio.timeout(patience_s):
                answer = await self._read()
        except TimeoutError:
            self.abort()
            raise NoAnswer(f"hang: no answer within {patience_s:g} s") from None
        except asyncio.IncompleteReadError as error:
            self.abort()
            raise NoAnswer(f"closed {'within' if error.partial else 'before'} the answer") from None
        except (OSError, ValueError, KeyError, asyncio.LimitOverrunError) as error:
            self.abort()
            raise NoAnswer(f"{type(error).__name__}: {error}") from None
        self._closing = answer.headers.get("connection", "").lower() == "close"
        return answer

    async def close(self) -> None:
        """Close, and wait until it is."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Leave with a reset, as a client that crashes."""
        end = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def _read(self) -> HttpAnswer:
        head = "HTTP/1.1 100 "
        while head.startswith("HTTP/1.1 1"):  # an interim response has another one behind it
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await self._reader.readexactly(int(headers["content-length"]))
        return HttpAnswer(int(first.split(" ", 2)[1]), headers, body)
