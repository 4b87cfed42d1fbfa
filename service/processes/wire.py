"""The frames between an HTTP worker and the engine process, on one Unix stream socket per worker.

Both sides run one version of this code on one machine, so arrays travel as they lie in memory. A frame is a header (payload
length uint32, kind uint8) and a payload. One PREDICT or RESULTS frame carries everything of one event-loop iteration. Bytes
that are no frame, or do not hold what their kind says, are a ``WireError``, on which the reader closes the connection.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from service.engine.interface import EngineStatus, Explanation, ModelInfo, Outcome, Prediction
from service.errors import QUEUE_FULL, DeadlineExceeded, InferenceFailed, NotFound, NotReady, Overloaded, ServiceError

P = ParamSpec("P")
T = TypeVar("T")

_HEADER = struct.Struct("<IB")
MAX_PAYLOAD_BYTES = 2**30  # 350,000 images of 32x32, far above what one event-loop iteration brings
# Entries are few in a frame, and numpy takes longer to begin than these take to end.
_PREDICT_ENTRY = struct.Struct("<IHd")  # id, images, deadline
_RESULT_ENTRY = struct.Struct("<IHBHHff")  # id, images (0 for an error), error, retry_after_s, batch_size, queue_s, compute_s
_MAX_RETRY_AFTER_S = 2**16 - 1  # what ``retry_after_s`` above can hold: 18 hours
_COUNT = struct.Struct("<I")
_EXPLAIN_HEAD = struct.Struct("<Iid")  # id, class or -1, deadline
_RESULTS_HEAD = struct.Struct("<III")  # entries, model index, images waiting in the queue

# The errors that an engine ends requests with; the wire carries the position.
_ERRORS: tuple[type[ServiceError], ...] = (InferenceFailed, Overloaded, DeadlineExceeded, NotReady)
_DETAILS = (
    "the model failed on this image; send another, or report it if it is a sound image",
    QUEUE_FULL,
    "the deadline passed, or could not have been met; retry, or allow more time",
    "the engine cannot answer now; retry shortly",
)


_MODEL = TypeAdapter(tuple[int, ModelInfo])
_STATUS = TypeAdapter(EngineStatus)

# Explanations are rare, so their errors travel as code and text.
_EXPLAIN_ERRORS: dict[str, type[ServiceError]] = {NotFound.code: NotFound, **{error.code: error for error in _ERRORS}}


class WireError(Exception):
    """Bytes that are no frame, or a frame that does not hold what its kind says."""


class Kind(IntEnum):
    """What a frame is; PREDICT, CANCEL and EXPLAIN go to the engine, the others come from it."""

    PREDICT = 1
    CANCEL = 2
    RESULTS = 3
    MODEL = 4
    STATUS = 5
    EXPLAIN = 6
    EXPLANATION = 7


_KINDS = {kind.value: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class PredictEntry:
    """One request on its way to the engine; ``images`` is uint8 (n, 3, size, size)."""

    id: int
    deadline: float
    images: NDArray[np.uint8]


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = _HEADER.size  # bytes of the frame that has begun, as far as is known

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Add what arrived and yield every frame that is now complete; raise WireError where none can begin."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return
            data, self._buffer = bytes(self._buffer), bytearray()
        start = 0
        self._needed = _HEADER.size
        while len(data) - start >= _HEADER.size:
            length, kind = _HEADER.unpack_from(data, start)
            if kind not in _KINDS or length > MAX_PAYLOAD_BYTES:
                raise WireError(f"no frame is of kind {kind} with {length:,} bytes")
            end = start + _HEADER.size + length
            if len(data) < end:
                self._needed = end - start
                break
            yield _KINDS[kind], data[start + _HEADER.size : end]
            start = end
        self._buffer += data[start:]


def _frame(kind: Kind, *parts: bytes) -> bytes:
    length = sum(map(len, parts))
    assert length <= MAX_PAYLOAD_BYTES, "both sides bound what they have on its way"
    return b"".join((_HEADER.pack(length, kind), *parts))


def _strict(kind: Kind) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make one error of everything that wrong bytes can cause; decorates each ``unpack`` function."""

    def wrap(unpack: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(unpack)
        def strict(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return unpack(*args, **kwargs)
            except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
                raise WireError(f"a {kind.name} frame does not hold what it says") from error

        return strict

    return wrap


def pack_predict(entries: Sequence[PredictEntry]) -> bytes:
    """Make one PREDICT frame."""
    head = [_PREDICT_ENTRY.pack(entry.id, len(entry.images), entry.deadline) for entry in entries]
    return _frame(Kind.PREDICT, _COUNT.pack(len(entries)), *head, *(entry.images.tobytes() for entry in entries))


@_strict(Kind.PREDICT)
def unpack_predict(payload: bytes, size: int) -> list[PredictEntry]:
    """Read a PREDICT frame of ``size`` x ``size`` images; the arrays are read-only views of ``payload``."""
    (count,) = _COUNT.unpack_from(payload)
    end = _COUNT.size + count * _PREDICT_ENTRY.size
    images = np.frombuffer(payload, np.uint8, offset=end).reshape(-1, 3, size, size)
    entries, start = [], 0
    for id_, images_of_entry, deadline in _PREDICT_ENTRY.iter_unpack(payload[_COUNT.size : end]):
        entries.append(PredictEntry(id_, deadline, images[start : start + images_of_entry]))
        start += images_of_entry
    if start != len(images) or len(entries) != count:
        raise ValueError("images are missing, or left over")
    return entries


def pack_cancel(ids: Sequence[int]) -> bytes:
    """Make one CANCEL frame."""
    return _frame(Kind.CANCEL, np.array(ids, "<u4").tobytes())


@_strict(Kind.CANCEL)
def unpack_cancel(payload: bytes) -> list[int]:
    """Read a CANCEL frame."""
    ids: list[int] = np.frombuffer(payload, "<u4").tolist()
    return ids


def pack_results(outcomes: Sequence[tuple[int, Outcome]], model_index: int, queue_depth: int) -> bytes:
    """Make one RESULTS frame; every prediction in it was made by the model announced as ``model_index``."""
    rows, arrays = [], []
    for id_, outcome in outcomes:
        if isinstance(outcome, ServiceError):
            retry_after_s = min(outcome.retry_after_s or 0, _MAX_RETRY_AFTER_S)
            rows.append(_RESULT_ENTRY.pack(id_, 0, _ERRORS.index(type(outcome)), retry_after_s, 0, 0.0, 0.0))
        else:
            count = len(outcome.probabilities)
            rows.append(_RESULT_ENTRY.pack(id_, count, 0, 0, outcome.batch_size, outcome.queue_s, outcome.compute_s))
            arrays.append(outcome.probabilities.tobytes())
            if outcome.typicality is not None:
                arrays.append(outcome.typicality.tobytes())
    return _frame(Kind.RESULTS, _RESULTS_HEAD.pack(len(rows), model_index, queue_depth), *rows, *arrays)


@_strict(Kind.RESULTS)
def unpack_results(payload: bytes, models: dict[int, ModelInfo]) -> tuple[list[tuple[int, Outcome]], int]:
    """Read a RESULTS frame: the outcome of every request by its id, and the queue's depth in images."""
    count, model_index, queue_depth = _RESULTS_HEAD.unpack_from(payload)
    end = _RESULTS_HEAD.size + count * _RESULT_ENTRY.size
    flat = np.frombuffer(payload, np.float32, offset=end)
    outcomes: list[tuple[int, Outcome]] = []
    start = 0
    for id_, images, error, retry_after_s, batch_size, queue_s, compute_s in _RESULT_ENTRY.iter_unpack(
        payload[_RESULTS_HEAD.size : end]
    ):
        if images:
            model = models[model_index]
            classes = len(model.class_names)
            end_of_rows = start + images * classes
            rows = flat[start:end_of_rows].reshape(images, classes)
            start = end_of_rows
            typicality = None
            if model.unknown_threshold is not None:
                start += images
                typicality = flat[end_of_rows:start]
            outcomes.append((id_, Prediction(rows, model, queue_s, compute_s, batch_size, typicality)))
        else:
            outcomes.append((id_, _ERRORS[error](_DETAILS[error], retry_after_s=retry_after_s or None)))
    if start != len(flat) or len(outcomes) != count:
        raise ValueError("answers are missing, or left over")
    return outcomes, queue_depth


def pack_explain(id_: int, image: NDArray[np.uint8], label: int | None, deadline: float) -> bytes:
    """Make one EXPLAIN frame."""
    return _frame(Kind.EXPLAIN, _EXPLAIN_HEAD.pack(id_, -1 if label is None else label, deadline), image.tobytes())


@_strict(Kind.EXPLAIN)
def unpack_explain(payload: bytes, size: int) -> tuple[int, NDArray[np.uint8], int | None, float]:
    """Read an EXPLAIN frame: id, image, class and deadline."""
    id_, label, deadline = _EXPLAIN_HEAD.unpack_from(payload)
    image = np.frombuffer(payload, np.uint8, offset=_EXPLAIN_HEAD.size).reshape(3, size, size)
    return id_, image, None if label < 0 else label, deadline


def pack_explanation(id_: int, outcome: Explanation | ServiceError, model_index: int) -> bytes:
    """Make one EXPLANATION frame; the explained model was announced as ``model_index``."""
    fields: dict[str, Any] = {"id": id_}
    heatmap = b""
    if isinstance(outcome, ServiceError):
        fields |= {"error": outcome.code, "detail": outcome.detail, "retry_after_s": outcome.retry_after_s}
    else:
        fields |= {"model": model_index, "label": outcome.label}
        heatmap = outcome.heatmap.astype(np.float32).tobytes()
    head = json.dumps(fields).encode()
    return _frame(Kind.EXPLANATION, _COUNT.pack(len(head)), head, heatmap)


@_strict(Kind.EXPLANATION)
def unpack_explanation(payload: bytes, models: dict[int, ModelInfo]) -> tuple[int, Explanation | ServiceError]:
    """Read an EXPLANATION frame: the id and its outcome."""
    (length,) = _COUNT.unpack_from(payload)
    end = _COUNT.size + length
    fields: dict[str, Any] = json.loads(payload[_COUNT.size : end])
    if "error" in fields:
        kind = _EXPLAIN_ERRORS[fields["error"]]
        return fields["id"], kind(fields["detail"], retry_after_s=fields["retry_after_s"])
    model = models[fields["model"]]
    heatmap = np.frombuffer(payload[end:], np.float32).reshape(model.input.size, model.input.size)
    return fields["id"], Explanation(heatmap, fields["label"], model)


def pack_model(index: int, model: ModelInfo) -> bytes:
    """Make one MODEL frame, which announces what ``model_index`` means from here on."""
    return _frame(Kind.MODEL, _MODEL.dump_json((index, model)))


@_strict(Kind.MODEL)
def unpack_model(payload: bytes) -> tuple[int, ModelInfo]:
    """Read a MODEL frame."""
    return _MODEL.validate_json(payload)


def pack_status(status: EngineStatus) -> bytes:
    """Make one STATUS frame, which is the engine's heartbeat too; the model goes by MODEL frames."""
    return _frame(Kind.STATUS, _STATUS.dump_json(replace(status, model=None)))


@_strict(Kind.STATUS)
def unpack_status(payload: bytes, model: ModelInfo | None) -> EngineStatus:
    """Read a STATUS frame."""
    return replace(_STATUS.validate_json(payload), model=model)
