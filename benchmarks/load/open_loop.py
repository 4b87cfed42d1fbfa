"""Open-loop load: requests arrive at random times of a given rate, whether or not earlier ones have been answered.

Owns: the arrivals and the latencies, counted from the time a request was due. Does not know: the servers. Its own process
takes part of the machine, so rates near saturation are lower than wrk's.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools


@dataclass(frozen=True)
class OpenLoopResult:
    """Latencies in milliseconds of answered requests and of refused ones, with 429, 503 or 504; nan where there is none."""

    offered_per_s: float
    answered_per_s: float
    p50_ms: float
    p99_ms: float
    refused: int
    errors: int
    refused_p50_ms: float
    refused_p99_ms: float


async def run_open_loop(
    url: str, requests: list[bytes], *, rate_per_s: float, duration_s: float, connections: int = 512, seed: int = 0
) -> OpenLoopResult:
    """Offer ``requests`` as a Poisson process; an arrival without a free connection waits, and its wait is counted."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    load = _Load()
    for _ in range(connections):
        _, client = await loop.create_connection(lambda: _Client(load), str(parts.hostname), parts.port or 80)
        load.free.append(client)
    rng = random.Random(seed)
    due = began = time.monotonic()
    number = 0
    while due < began + duration_s:
        now = time.monotonic()
        while due <= now and due < began + duration_s:
            load.send(requests[number % len(requests)], due)
            number += 1
            due += rng.expovariate(rate_per_s)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    with_patience = time.monotonic() + 30
    while load.open and time.monotonic() < with_patience:
        await asyncio.sleep(0.01)
    for client in load.clients:
        client.close()
    answered, refused = sorted(load.latencies_s), sorted(load.refusals_s)
    return OpenLoopResult(
        number / duration_s,
        len(answered) / duration_s,
        percentile_ms(answered, 0.50),
        percentile_ms(answered, 0.99),
        len(refused),
        load.errors + load.open,
        percentile_ms(refused, 0.50),
        percentile_ms(refused, 0.99),
    )


def percentile_ms(latencies_s: list[float], share: float) -> float:
    """Give the latency in milliseconds that ``share`` of the ascending ``latencies_s`` do not exceed; nan for none."""
    if not latencies_s:
        return float("nan")
    return latencies_s[min(len(latencies_s) - 1, int(share * len(latencies_s)))] * 1e3


class _Load:
    def __init__(self) -> None:
        self.free: deque[_Client] = deque()
        self.clients: list[_Client] = []
        self.waiting: deque[tuple[bytes, float]] = deque()
        self.latencies_s: list[float] = []
        self.refusals_s: list[float] = []
        self.open = self.errors = 0

    def send(self, request: bytes, due: float) -> None:
        self.open += 1
        if self.free:
            self.free.popleft().send(request, due)
        else:
            self.waiting.append((request, due))

    def answered(self, client: _Client, status: int, due: float) -> None:
        self.open -= 1
        if status == 200:
            self.latencies_s.append(time.monotonic() - due)
        elif status in (429, 503, 504):
            self.refusals_s.append(time.monotonic() - due)
        else:
            self.errors += 1
        if self.waiting:
            client.send(*self.waiting.popleft())
        else:
            self.free.append(client)


class _Client(asyncio.Protocol):
    def __init__(self, load: _Load) -> None:
        self._load = load
        self._due = 0.0
        self._busy = False
        load.clients.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a TCP connection"
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._busy:
            self._load.errors += 1
            self._load.open -= 1

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._busy = False
        self._parser = httptools.HttpResponseParser(self)
        self._load.answered(self, status, self._due)

    def send(self, request: bytes, due: float) -> None:
        self._due, self._busy = due, True
        self._transport.write(request)

    def close(self) -> None:
        self._busy = False
        self._transport.close()
