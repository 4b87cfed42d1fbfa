"""A load balancer's view of the service: readiness, asked for again and again over connections of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Self

from benchmarks.load.http_connection import HttpAnswer, HttpConnection, NoAnswer
from benchmarks.load.uploads import http_request

_PERIOD_S = 0.05
_PATIENCE_S = 30.0


class HealthWatch:
    """Asks ``url``/health/ready twenty times a second in the ``async with`` block.

    ``lost_ports`` are the clients' ports of probes that were sent and not answered; ``unreachable`` counts those that
    nobody accepted.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._ready_at: list[float] = []
        self._unready_at: list[float] = []
        self.lost_ports: list[int] = []
        self.unreachable = 0
        self.deepest_queue = 0
        self.slowest_s = 0.0
        self._asked_at: float | None = None

    async def __aenter__(self) -> Self:
        """Start asking."""
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ask no more; a probe that still waits counts for as long as it has waited."""
        if self._asked_at is not None:
            self.slowest_s = max(self.slowest_s, time.monotonic() - self._asked_at)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    @property
    def ready_again_at(self) -> float | None:
        """When a probe first found it ready after the last that did not; None when it was never found otherwise."""
        if not self._unready_at:
            return None
        return next((at for at in self._ready_at if at > self._unready_at[-1]), float("inf"))

    async def _watch(self) -> None:
        while True:
            began = self._asked_at = time.monotonic()
            answer = await ask_ready(self._url, self)
            now = time.monotonic()
            self._asked_at = None
            if answer is not None:
                self.slowest_s = max(self.slowest_s, now - began)
                (self._ready_at if answer.status == 200 else self._unready_at).append(now)
                self.deepest_queue = max(self.deepest_queue, json.loads(answer.body).get("queue_depth", 0))
            await asyncio.sleep(_PERIOD_S)


async def ask_ready(url: str, watch: HealthWatch | None = None) -> HttpAnswer | None:
    """Ask once; None where there is no answer, which ``watch`` is told."""
    watch = watch or HealthWatch(url)
    try:
        connection = await HttpConnection.open(url)
    except OSError:
        watch.unreachable += 1
        return None
    try:
        return await connection.exchange(http_request("GET", "/health/ready"), patience_s=_PATIENCE_S)
    except NoAnswer:
        watch.lost_ports.append(connection.local_port)
        return None
    finally:
        await connection.close()
