"""A tiny HTTP proxy in front of several instances, which sends each request to the next one that says it is ready.

It never tries a request twice: what an instance loses, the client sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Self

from benchmarks.load.health_watch import ask_ready
from benchmarks.load.http_connection import HttpConnection, NoAnswer

_PROBE_PERIOD_S = 0.1
_PATIENCE_S = 60.0


class RoundRobinProxy:
    """Listens on ``url`` in the ``async with`` block; ``instances`` may be changed at any time."""

    def __init__(self, instances: list[str]) -> None:
        self.instances = instances
        self.ready = list(instances)
        self._turn = 0

    async def __aenter__(self) -> Self:
        """Listen, and watch the instances."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._probing = asyncio.create_task(self._probe())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        self._probing.cancel()
        self._server.close()

    async def _probe(self) -> None:
        while True:
            instances = list(self.instances)
            answers = await asyncio.gather(*(ask_ready(url) for url in instances))
            self.ready = [url for url, answer in zip(instances, answers, strict=True) if answer and answer.status == 200]
            await asyncio.sleep(_PROBE_PERIOD_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one client's requests, each over a connection of its own; a lost one closes the client's."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, NoAnswer):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if not self.ready:
                    break
                self._turn += 1
                upstream = await HttpConnection.open(self.ready[self._turn % len(self.ready)])
                try:
                    answer = await upstream.exchange(head + body, patience_s=_PATIENCE_S)
                finally:
                    await upstream.close()
                lines = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items() if name != "connection")
                writer.write(f"HTTP/1.1 {answer.status} Passed on\r\n{lines}\r\n".encode("latin-1") + answer.body)
        writer.close()
