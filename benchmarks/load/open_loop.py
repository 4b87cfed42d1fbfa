"""Open-loop load: requests arrive at random times of a given rate, whether or not earlier ones have been answered.

Latency counts from the time a request was due. The load's own process takes a share of the machine, so rates near saturation
are lower than wrk's.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from benchmarks.load.http_connection import HttpConnection, NoAnswer

_HANG_S = 30.0


@dataclass(frozen=True)
class OpenLoopResult:
    """Latencies in milliseconds of requests with 200, nan for none; ``refused`` ones had 429, 503 or 504."""

    offered_per_s: float
    answered_per_s: float
    p50_ms: float
    p99_ms: float
    refused: int
    errors: int


async def run_open_loop(
    url: str, requests: list[bytes], *, rate_per_s: float, duration_s: float, connections: int = 512, seed: int = 0
) -> OpenLoopResult:
    """Offer ``requests`` as a Poisson process; an arrival without a free connection waits, and its wait is counted."""
    arrivals: asyncio.Queue[tuple[bytes, float] | None] = asyncio.Queue()
    opened = [await HttpConnection.open(url) for _ in range(connections)]
    answered: list[float] = []
    refused = errors = number = 0

    async def serve(connection: HttpConnection) -> None:
        nonlocal errors, refused
        while (arrival := await arrivals.get()) is not None:
            request, due = arrival
            try:
                if not connection.is_open:
                    connection = await HttpConnection.open(url)
                status = (await connection.exchange(request, patience_s=_HANG_S)).status
            except (NoAnswer, OSError):
                status = 0
            if status == 200:
                answered.append(time.monotonic() - due)
            elif status in (429, 503, 504):
                refused += 1
            else:
                errors += 1
        await connection.close()

    rng = random.Random(seed)
    async with asyncio.TaskGroup() as clients:
        for connection in opened:
            clients.create_task(serve(connection))
        due = began = time.monotonic()
        while due < began + duration_s:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            arrivals.put_nowait((requests[number % len(requests)], due))
            number += 1
            due += rng.expovariate(rate_per_s)
        for _ in opened:
            arrivals.put_nowait(None)
    answered.sort()
    return OpenLoopResult(
        number / duration_s,
        len(answered) / duration_s,
        percentile_ms(answered, 0.50),
        percentile_ms(answered, 0.99),
        refused,
        errors,
    )


def percentile_ms(latencies_s: list[float], share: float) -> float:
    """Latency in milliseconds that ``share`` of the ascending ``latencies_s`` do not exceed; nan for none."""
    if not latencies_s:
        return float("nan")
    return latencies_s[min(len(latencies_s) - 1, int(share * len(latencies_s)))] * 1e3
