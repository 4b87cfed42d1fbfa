"""The frames between an HTTP worker and the engine process, on one Unix stream socket per worker.

A frame is the lengths of its head and its body, a head in JSON, and a body of arrays as they lie in memory: both sides run
this code on one machine. To the engine, a head is a list of requests. From it, a head is a list of outcomes, or an object: the
engine's status, sent when it changes. Everything of one event-loop iteration goes as one frame. A frame that cannot be read
ends the connection.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import TypeAdapter

from service.engine.interface import Engine, EngineStatus, Explanation, ModelInfo, Outcome, Prediction, Request
from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded, ServiceError

logger = logging.getLogger(__name__)

Sent = TypeVar("Sent")

_LENGTHS = struct.Struct("<II")  # of head and body, in bytes
MAX_FRAME_BYTES = 2**30  # 350,000 images of 32x32, far above what one event-loop iteration brings
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # what reading a damaged frame raises
_EXPLANATION = -1  # in the place of the number of images
_STATUS = TypeAdapter(EngineStatus)
_ERRORS = {error.code: error for error in (InferenceFailed, Overloaded, DeadlineExceeded, NotReady)}

RequestRow = tuple[int, NDArray[np.uint8], float, int | None]  # id, images, deadline, explain


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = _LENGTHS.size  # bytes of the frame that has begun, as far as is known

    def feed(self, data: bytes) -> Iterator[tuple[Any, bytes]]:
        """Add what arrived and yield head and body of each frame that is now complete; raise ValueError where there is none."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return
            data, self._buffer = bytes(self._buffer), bytearray()
        start = 0
        self._needed = _LENGTHS.size
        while len(data) - start >= _LENGTHS.size:
            head_bytes, body_bytes = _LENGTHS.unpack_from(data, start)
            if head_bytes + body_bytes > MAX_FRAME_BYTES:
                raise ValueError(f"a frame does not have {head_bytes + body_bytes:,} bytes")
            body = start + _LENGTHS.size + head_bytes
            end = body + body_bytes
            if len(data) < end:
                self._needed = end - start
                break
            yield orjson.loads(data[start + _LENGTHS.size : body]), data[body:end]
            start = end
        self._buffer += data[start:]


class Connection(ABC, asyncio.Protocol, Generic[Sent]):
    """One end of a socket: what is ``put`` in one event-loop iteration is sent as one frame at its end."""

    def __init__(self, pack: Callable[[list[Sent]], bytes]) -> None:
        """Make frames of what was put by ``pack``."""
        self._pack = pack
        self._to_send: list[Sent] = []
        self._transport: asyncio.Transport | None = None

    @abstractmethod
    def received(self, head: Any, body: bytes) -> None:
        """Read a frame and act on it; raise one of UNREADABLE where it is damaged."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = cast(asyncio.Transport, transport)
        self._reader = FrameReader()

    def connection_lost(self, error: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = None
        self._to_send.clear()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        try:
            for head, body in self._reader.feed(data):
                self.received(head, body)
        except UNREADABLE:
            logger.exception("disconnected: a frame cannot be read")
            if self._transport is not None:
                self._transport.abort()

    def put(self, item: Sent) -> None:
        """Send ``item`` at the end of this event-loop iteration."""
        if not self._to_send:
            asyncio.get_running_loop().call_soon(self.flush)
        self._to_send.append(item)

    def flush(self) -> None:
        """Send what was put."""
        items, self._to_send = self._to_send, []
        if items:
            self.send(self._pack(items))

    def send(self, frame: bytes) -> None:
        """Send a frame at once, unless the connection is lost."""
        if self._transport is not None:
            self._transport.write(frame)

    def close(self) -> None:
        """Send what there is to send, then disconnect."""
        self.flush()
        if self._transport is not None:
            self._transport.close()


class WorkerConnection(Connection[tuple[int, Outcome]]):
    """The engine's end: a worker's requests go to the engine, and their outcomes back."""

    def __init__(self, engine: Engine, connections: set[WorkerConnection]) -> None:
        """Be among ``connections`` while the worker is connected, which first gets the engine's status."""
        super().__init__(pack_outcomes)
        self._engine = engine
        self._connections = connections
        self._requests: dict[int, Request] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        self._connections.add(self)
        self.send(pack_status(self._engine.status()))

    def connection_lost(self, error: Exception | None) -> None:
        """Cancel what a dead worker was waiting for."""
        super().connection_lost(error)
        self._connections.discard(self)
        for request in self._requests.values():
            self._engine.cancel(request)

    def received(self, head: Any, body: bytes) -> None:
        """Submit the requests, or cancel those without images."""
        model = self._engine.model
        assert model is not None, "an engine that serves workers has a model"
        for id_, images, deadline, explain in unpack_requests(head, body, model.input.size):
            if not len(images):
                if (request := self._requests.pop(id_, None)) is not None:
                    self._engine.cancel(request)
                continue
            try:
                self._requests[id_] = self._engine.submit(images, deadline, partial(self._finish, id_), explain)
            except ServiceError as error:
                self._finish(id_, error)

    def _finish(self, id_: int, outcome: Outcome) -> None:
        self._requests.pop(id_, None)
        self.put((id_, outcome))


def pack_requests(requests: Sequence[Request]) -> bytes:
    """Make a frame of requests; one whose ``images`` are none any more cancels what was sent before with its id."""
    rows = [(request.id, len(request.images), request.deadline, request.explain) for request in requests]
    return _frame(rows, [request.images.tobytes() for request in requests])


def unpack_requests(head: Any, body: bytes, size: int) -> list[RequestRow]:
    """Read a frame of requests with images of ``size`` x ``size``; the arrays are read-only views of ``body``."""
    images = np.frombuffer(body, np.uint8).reshape(-1, 3, size, size)
    rows: list[RequestRow] = []
    start = 0
    for id_, count, deadline, explain in head:
        rows.append((id_, images[start : start + count], deadline, explain))
        start += count
    if start != len(images):
        raise ValueError("images are missing, or left over")
    return rows


def pack_outcomes(outcomes: Sequence[tuple[int, Outcome]]) -> bytes:
    """Make a frame of outcomes by their request's id; their models are known from a status sent before."""
    rows: list[tuple[object, ...]] = []
    arrays: list[bytes] = []
    for id_, outcome in outcomes:
        if isinstance(outcome, Prediction):
            count, version = len(outcome.probabilities), outcome.model.version
            rows.append((id_, count, version, outcome.batch_size, outcome.queue_s, outcome.compute_s))
            arrays.append(outcome.probabilities.tobytes())
            if outcome.typicality is not None:
                arrays.append(outcome.typicality.tobytes())
        elif isinstance(outcome, Explanation):
            rows.append((id_, _EXPLANATION, outcome.model.version, outcome.label))
            arrays.append(outcome.heatmap.astype(np.float32).tobytes())
        else:
            rows.append((id_, 0, outcome.code, outcome.detail, outcome.retry_after_s))
    return _frame(rows, arrays)


def unpack_outcomes(head: Any, body: bytes, models: Mapping[str, ModelInfo]) -> list[tuple[int, Outcome]]:
    """Read a frame of outcomes; ``models`` has every model by its version."""
    flat = np.frombuffer(body, np.float32)
    outcomes: list[tuple[int, Outcome]] = []
    start = 0
    for id_, count, name, *rest in head:
        if count > 0:
            batch_size, queue_s, compute_s = rest
            model = models[name]
            classes = len(model.class_names)
            end = start + count * classes
            rows = flat[start:end].reshape(count, classes)
            start, typicality = end, None
            if model.unknown_threshold is not None:
                start += count
                typicality = flat[end:start]
            outcomes.append((id_, Prediction(rows, model, queue_s, compute_s, batch_size, typicality)))
        elif count == _EXPLANATION:
            model, side = models[name], models[name].input.size
            heatmap = flat[start : start + side * side].reshape(side, side)
            start += side * side
            outcomes.append((id_, Explanation(heatmap, rest[0], model)))
        else:
            detail, retry_after_s = rest
            outcomes.append((id_, _ERRORS[name](detail, retry_after_s=retry_after_s)))
    if start != len(flat):
        raise ValueError("results are missing, or left over")
    return outcomes


def pack_status(status: EngineStatus) -> bytes:
    """Make a frame of the engine's status; the queue's depth is not in it, see ``Load``."""
    return _frame(status, [])


def unpack_status(head: Any) -> EngineStatus:
    """Read the head of a status's frame."""
    return _STATUS.validate_python(head)


def _frame(head: object, arrays: Sequence[bytes]) -> bytes:
    packed, body_bytes = orjson.dumps(head), sum(map(len, arrays))
    assert len(packed) + body_bytes <= MAX_FRAME_BYTES, "both sides bound what they have on its way"
    return b"".join((_LENGTHS.pack(len(packed), body_bytes), packed, *arrays))
