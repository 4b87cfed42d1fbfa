"""The engine as an HTTP worker sees it: the same interface, over a Unix socket.

A lost connection ends every open request at once with NotReady; an engine that is silent is not ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import Engine, EngineStatus, Explanation, Finish, ModelInfo, Request, check_images
from service.engine.open_requests import OpenRequests
from service.errors import QUEUE_FULL, NotReady, Overloaded, ServiceError
from service.processes import wire
from service.processes.child import HEARTBEAT_S

logger = logging.getLogger(__name__)

SILENCE_S = 8 * HEARTBEAT_S  # the engine hangs, whatever its socket says
_RECONNECT_S = 0.05
_NOT_CONNECTED = EngineStatus("starting", None, "", "", 0)


class RemoteEngine(Engine):
    """See ``Engine``; the requests of one event-loop iteration are sent as one frame at its end."""

    def __init__(
        self,
        path: str,
        *,
        max_batch_size: int,
        max_outstanding_images: int,
        silence_s: float = SILENCE_S,
        full_for_s: Callable[[], int] = lambda: 0,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Connect to the Unix socket at ``path``, again and again until ``close``.

        ``full_for_s`` returns the seconds after which to retry while the engine's queue is full, and 0 while there is room.
        ``on_change`` is called after every change of state or model.
        """
        self._path = path
        self._max_batch_size = max_batch_size
        self._max_outstanding_images = max_outstanding_images
        self._silence_s = silence_s
        self._full_for_s = full_for_s
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._requests = OpenRequests(self._withdraw)
        self._to_send: list[wire.PredictEntry] = []
        self._to_cancel: list[int] = []
        self._flush_scheduled = False
        self._transport: asyncio.Transport | None = None
        self._models: dict[int, ModelInfo] = {}
        self._status = _NOT_CONNECTED
        self._heard = time.monotonic()
        self._connecting = self._loop.create_task(self._keep_connected())

    def status(self) -> EngineStatus:
        """See ``Engine.status``; an engine that has been silent for ``silence_s`` seconds is not ready."""
        if self._status.state == "ready" and time.monotonic() - self._heard > self._silence_s:
            return replace(self._status, state="starting")
        return self._status

    def submit(self, images: NDArray[np.uint8], deadline: float, finish: Finish) -> Request:
        """See ``Engine.submit``; the engine's own refusals are passed to ``finish``."""
        model = self._require_ready()
        check_images(images, model.input.size, self._max_batch_size)
        if self._requests.images + len(images) > self._max_outstanding_images:
            raise Overloaded(QUEUE_FULL, retry_after_s=1)
        request = Request(images, deadline, finish)
        self._requests.add(request)
        self._to_send.append(wire.PredictEntry(request.id, deadline, images))
        self._schedule_flush()
        return request

    def submit_explanation(
        self, image: NDArray[np.uint8], label: int | None, deadline: float, finish: Callable[[Explanation | ServiceError], None]
    ) -> Request:
        """See ``Engine.submit_explanation``; the engine's own refusals are passed to ``finish``."""
        self._require_ready()
        assert self._transport is not None, "a ready engine is connected"
        request = Request(image[None], deadline, finish)
        self._requests.add(request)
        self._transport.write(wire.pack_explain(request.id, image, label, deadline))
        return request

    def check_room(self) -> None:
        """See ``Engine.check_room``."""
        self._require_ready()
        if retry_after_s := self._full_for_s():
            raise Overloaded(QUEUE_FULL, retry_after_s=retry_after_s)

    def cancel(self, request: Request) -> None:
        """See ``Engine.cancel``."""
        if self._requests.discard(request):
            self._withdraw(request)

    def close(self) -> None:
        """Disconnect for good and fail what is left."""
        self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._disconnected()

    async def _keep_connected(self) -> None:
        while True:
            try:
                _, protocol = await self._loop.create_unix_connection(lambda: _Connection(self), self._path)
            except OSError:
                await asyncio.sleep(_RECONNECT_S)
                continue
            await protocol.lost.wait()

    def _connected(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def _disconnected(self) -> None:
        self._transport = None
        self._models.clear()
        self._to_send.clear()
        self._to_cancel.clear()
        self._set_status(_NOT_CONNECTED)
        if self._requests:
            logger.warning("engine lost waiting_requests=%d", len(self._requests))
        self._requests.end_all(NotReady("the engine stopped before the prediction was ready; retry", retry_after_s=1))

    def _received(self, kind: wire.Kind, payload: bytes) -> None:
        self._heard = time.monotonic()
        if kind is wire.Kind.RESULTS:
            outcomes, queue_depth = wire.unpack_results(payload, self._models)
            self._status = replace(self._status, queue_depth=queue_depth)
            for id_, outcome in outcomes:
                self._requests.end(id_, outcome)
        elif kind is wire.Kind.EXPLANATION:
            self._requests.end(*wire.unpack_explanation(payload, self._models))
        elif kind is wire.Kind.MODEL:
            index, model = wire.unpack_model(payload)
            self._models[index] = model
            self._set_status(replace(self._status, model=model))
        elif kind is wire.Kind.STATUS:
            self._set_status(wire.unpack_status(payload, self._status.model))

    def _set_status(self, status: EngineStatus) -> None:
        changed = (status.state, status.model) != (self._status.state, self._status.model)
        self._status = status
        if changed and self._on_change is not None:
            self._on_change()

    def _require_ready(self) -> ModelInfo:
        """Return the model that serves; raise NotReady while there is none."""
        model = self._status.model
        if self._transport is None or model is None or self.status().state != "ready":
            raise NotReady("the engine is not ready; retry shortly", retry_after_s=1)
        return model

    def _withdraw(self, request: Request) -> None:
        """Have the engine cancel a request that has ended here."""
        self._to_cancel.append(request.id)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._transport is None:
            return
        if self._to_send:
            self._transport.write(wire.pack_predict(self._to_send))
            self._to_send.clear()
        if self._to_cancel:
            self._transport.write(wire.pack_cancel(self._to_cancel))
            self._to_cancel.clear()


class _Connection(asyncio.Protocol):
    """Passes frames to the engine object."""

    def __init__(self, engine: RemoteEngine) -> None:
        self.lost = asyncio.Event()
        self._engine = engine
        self._reader = wire.FrameReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._engine._connected(self._transport)

    def data_received(self, data: bytes) -> None:
        try:
            for kind, payload in self._reader.feed(data):
                self._engine._received(kind, payload)
        except wire.WireError as error:
            logger.error("engine disconnected: %s", error)
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._engine._disconnected()
        self.lost.set()
