"""Open-loop load: requests arrive at random times of a given rate, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import random
import time

from benchmarks.load.http_connection import HttpConnection, NoAnswer

_HANG_S = 30.0


async def run_open_loop(url: str, requests: list[bytes], *, rate_per_s: float, duration_s: float, seed: int = 0) -> list[float]:
    """Offer ``requests`` as a Poisson process; return the ascending latencies in seconds, from when each was due.

    One that is refused or lost took forever. An arrival takes the connection that was used last, or opens one. The load's own
    process takes a share of the machine, so rates near saturation are lower than wrk's.
    """
    free: list[HttpConnection] = []
    took_s: list[float] = []

    async def send(request: bytes, due: float) -> None:
        try:
            connection = free.pop() if free else await HttpConnection.open(url)
            answer = await connection.exchange(request, patience_s=_HANG_S)
            took_s.append(time.monotonic() - due if answer.status == 200 else float("inf"))
            free.append(connection)
        except (NoAnswer, OSError):
            took_s.append(float("inf"))

    rng = random.Random(seed)
    async with asyncio.TaskGroup() as clients:
        due = began = time.monotonic()
        while due < began + duration_s:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            clients.create_task(send(requests[len(took_s) % len(requests)], due))
            due += rng.expovariate(rate_per_s)
    for connection in free:
        await connection.close()
    return sorted(took_s)
