"""The engine as an HTTP worker sees it: the same interface, over a Unix socket.

Owns: the connection, what is outstanding on it, and the truth about it: a lost connection fails what waits at once, a
silent one is not ready. Does not know: batching, HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import Engine, EngineStatus, Explanation, Finish, ModelInfo, Request, check_images
from service.errors import QUEUE_FULL, NotReady, Overloaded, ServiceError, deadline_passed
from service.processes import wire

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
SILENCE_S = 2.0  # eight missed heartbeats: the engine hangs, whatever its socket says
_RECONNECT_S = 0.05
_NOT_CONNECTED = EngineStatus("starting", None, "", "", 0)


class RemoteEngine(Engine):
    """See ``Engine``; ``submit`` puts off what a whole turn of the loop brings and sends it as one frame."""

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

        ``full_for_s`` says how many seconds the engine's queue asks for before a retry, 0 while there is room;
        ``on_change`` hears of every new state.
        """
        self._path = path
        self._max_batch_size = max_batch_size
        self._max_outstanding_images = max_outstanding_images
        self._silence_s = silence_s
        self._full_for_s = full_for_s
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._request_ids: dict[Request, int] = {}
        self._explanations: dict[int, asyncio.Future[Explanation]] = {}
        self._outstanding_images = 0
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
        """See ``Engine.submit``; the engine's own refusals come through ``finish``."""
        model = self._require_ready()
        check_images(images, model.input.size, self._max_batch_size)
        if self._outstanding_images + len(images) > self._max_outstanding_images:
            raise Overloaded(QUEUE_FULL, retry_after_s=1)
        id_ = next(self._ids) & 0xFFFFFFFF
        request = Request(images, deadline, finish)
        self._requests[id_] = request
        self._request_ids[request] = id_
        self._outstanding_images += len(images)
        self._to_send.append(wire.PredictEntry(id_, deadline, images))
        self._schedule_flush()
        return request

    def check_room(self) -> None:
        """See ``Engine.check_room``."""
        self._require_ready()
        if retry_after_s := self._full_for_s():
            raise Overloaded(QUEUE_FULL, retry_after_s=retry_after_s)

    def cancel(self, request: Request) -> None:
        """See ``Engine.cancel``."""
        id_ = self._request_ids.get(request)
        if id_ is not None:
            self._forget(id_)
            self._to_cancel.append(id_)
            self._schedule_flush()

    async def explain(self, image: NDArray[np.uint8], label: int | None, deadline: float) -> Explanation:
        """See ``Engine.explain``."""
        self._require_ready()
        id_ = next(self._ids) & 0xFFFFFFFF
        future = self._explanations[id_] = self._loop.create_future()
        assert self._transport is not None, "a ready engine is connected"
        self._transport.write(wire.pack_explain(id_, image, label, deadline))
        try:
            return await asyncio.wait_for(future, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise deadline_passed() from None
        finally:
            del self._explanations[id_]

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
        lost = list(self._requests.items())
        if lost:
            logger.warning("engine lost waiting_requests=%d", len(lost))
        for id_, request in lost:
            self._forget(id_)
            request.finish(NotReady("the engine stopped before the prediction was ready; retry", retry_after_s=1))
        for future in self._explanations.values():
            if not future.done():
                future.set_exception(NotReady("the engine stopped before the explanation was ready; retry", retry_after_s=1))

    def _received(self, kind: wire.Kind, payload: bytes) -> None:
        self._heard = time.monotonic()
        if kind is wire.Kind.RESULTS:
            outcomes, queue_depth = wire.unpack_results(payload, self._models)
            self._status = replace(self._status, queue_depth=queue_depth)
            for id_, outcome in outcomes:
                request = self._forget(id_)
                if request is not None:
                    request.finish(outcome)
        elif kind is wire.Kind.EXPLANATION:
            self._explained(*wire.unpack_explanation(payload, self._models))
        elif kind is wire.Kind.MODEL:
            index, model = wire.unpack_model(payload)
            self._models[index] = model
            self._set_status(replace(self._status, model=model))
        elif kind is wire.Kind.STATUS:
            self._set_status(wire.unpack_status(payload, self._status.model))

    def _explained(self, id_: int, outcome: Explanation | ServiceError) -> None:
        future = self._explanations.get(id_)
        if future is None or future.done():  # nobody waits for it any more
            return
        if isinstance(outcome, ServiceError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _set_status(self, status: EngineStatus) -> None:
        changed = (status.state, status.model) != (self._status.state, self._status.model)
        self._status = status
        if changed and self._on_change is not None:
            self._on_change()

    def _require_ready(self) -> ModelInfo:
        """Give the model that serves; raise NotReady while there is none."""
        model = self._status.model
        if self._transport is None or model is None or self.status().state != "ready":
            raise NotReady("the engine is not ready; retry shortly", retry_after_s=1)
        return model

    def _forget(self, id_: int) -> Request | None:
        request = self._requests.pop(id_, None)
        if request is not None:
            del self._request_ids[request]
            self._outstanding_images -= len(request.images)
        return request

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
    """Hands frames to the engine object."""

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
