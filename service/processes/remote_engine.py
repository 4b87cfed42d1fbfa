"""The engine as an HTTP worker sees it: the same interface, over a Unix socket.

A lost connection ends every open request at once with NotReady; an engine that is silent is not ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from service.engine.interface import Engine, EngineStatus, ModelInfo, Request, State
from service.errors import NotReady
from service.observability.shared_values import Facts
from service.processes import wire
from service.processes.child import HEARTBEAT_S

logger = logging.getLogger(__name__)

SILENCE_S = 8 * HEARTBEAT_S  # the engine hangs, whatever its socket says
_RECONNECT_S = 0.05


class RemoteEngine(Engine, wire.Connection[Request]):
    """See ``Engine``; the requests of one event-loop iteration are sent as one frame at its end."""

    def __init__(
        self,
        path: str,
        facts: Facts,
        *,
        max_batch_size: int,
        max_queue_images: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect to the Unix socket at ``path``, again and again until ``close``; ``facts`` are those of the engine process.

        An engine whose last heartbeat is ``SILENCE_S`` seconds old is not ready. ``on_change`` is called after every change of
        the status.
        """
        Engine.__init__(self, facts, max_batch_size=max_batch_size, max_queue_images=max_queue_images, on_change=on_change)
        wire.Connection.__init__(self, wire.pack_requests)
        self._path = path
        self._facts = facts
        self._models: dict[str, ModelInfo] = {}
        self._lost = asyncio.Event()
        self._connecting = asyncio.get_running_loop().create_task(self._keep_connected())

    @property
    def state(self) -> State:
        """See ``Engine.state``."""
        if self._status.state == "ready" and time.monotonic() - self._facts.beat_at > SILENCE_S:
            return "starting"
        return self._status.state

    def close(self) -> None:
        """Disconnect for good and fail what is left."""
        self._connecting.cancel()
        super().close()
        self.connection_lost(None)

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._lost.clear()
            try:
                await loop.create_unix_connection(lambda: self, self._path)
                await self._lost.wait()
            except OSError:
                await asyncio.sleep(_RECONNECT_S)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what is left; another connection follows."""
        super().connection_lost(error)
        self._lost.set()
        self._set_status(EngineStatus())
        if self._requests:
            logger.warning("engine lost waiting_requests=%d", len(self._requests))
        self._requests.end_all(NotReady("the engine stopped before the prediction was ready; retry", retry_after_s=1))

    def received(self, head: Any, body: bytes) -> None:
        """See ``wire.Connection``."""
        if isinstance(head, dict):
            status = wire.unpack_status(head)
            if status.model is not None:
                self._models[status.model.version] = status.model
            self._set_status(status)
        else:
            for id_, outcome in wire.unpack_outcomes(head, body, self._models):
                self._requests.end(id_, outcome)

    def _begin(self, request: Request) -> None:
        assert self._transport is not None, "a ready engine is connected"
        self.put(request)

    def _withdraw(self, request: Request) -> None:
        if self._transport is not None:
            request.images = request.images[:0]
            self.put(request)
