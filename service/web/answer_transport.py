"""Answers on their way to a connection's transport, so that they cost few calls of the system, and cheap ones.

Owns: what of an answer goes out together, and the answers of a turn of the event loop one right after the other. Does not
know: what is in them beyond an answer's first bytes.

Whoever waits for answers is woken by the first of them and still awake at the next: where Python made another answer between
two of them, each woke its client anew, which took longer than the sending.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Outbox:
    """The transports of one event loop that have whole answers to send at the end of its turn."""

    def __init__(self) -> None:
        self._waiting: list[AnswerTransport] = []

    def add(self, transport: AnswerTransport) -> None:
        """Have ``transport`` flushed at the end of this turn."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append(transport)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport in waiting:
            transport.flush()


class AnswerTransport:
    """A transport that sends an answer's head with the first of its body: one call of the system, where uvicorn makes two.

    What is written leaves in the order in which it came.
    """

    __slots__ = ("_held", "_outbox", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, outbox: Outbox) -> None:
        self._transport = transport
        self._outbox = outbox
        self._held = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write a part of an answer."""
        if self._held:
            data, self._held = self._held + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):  # after which the body is the client's
            self._held = data
            return
        self._transport.write(data)

    def write_whole(self, data: bytes) -> None:
        """Write an answer that is in one already, with those of this turn."""
        if not self._held:
            self._outbox.add(self)
        self._held += data

    def flush(self) -> None:
        """Send what is held back, unless the client has left: whole answers, or a head that no body follows, as after HEAD."""
        held, self._held = self._held, b""
        if held and not self.is_closing():
            self._transport.write(held)

    def close(self) -> None:
        """Close when everything is sent."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
