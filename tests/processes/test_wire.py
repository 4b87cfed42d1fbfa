"""The frames between workers and engine: what goes in comes out, and what is no frame is refused."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.interface import EngineStatus, Explanation, ModelInfo, Outcome, Prediction
from service.errors import DeadlineExceeded, InferenceFailed, NotFound, NotReady, Overloaded, ServiceError
from service.model.images import InputSpec
from service.processes import wire
from tests.support.fake_runner import images

MODEL = ModelInfo("fake", "0123456789ab", ("cat", "dog", "horse"), InputSpec(size=4, fit="squash"))
MODELS = {0: ModelInfo("other", "000000000000", ("a", "b"), InputSpec()), 1: MODEL}
STATUS = EngineStatus("ready", MODEL, "cpu", "fake", 17)
ENTRIES = [wire.PredictEntry(1, 12.5, images(7, size=4)), wire.PredictEntry(2**32 - 1, math.inf, images(8, 9, 10, size=4))]
OUTCOMES: list[tuple[int, Outcome]] = [
    (3, Prediction(np.array([[0.5, 0.25, 0.25]], np.float32), MODEL, 0.5, 0.25, 3)),
    (4, Overloaded("full", retry_after_s=7)),
    (5, Prediction(np.array([[1, 0, 0], [0, 1, 0]], np.float32), MODEL, 0.0, 0.125, 3)),
    (6, DeadlineExceeded("late")),
]
HEATMAP = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)

# One frame of every kind, and how its payload is read.
FRAMES: dict[wire.Kind, tuple[bytes, Callable[[bytes], object]]] = {
    wire.Kind.PREDICT: (wire.pack_predict(ENTRIES), lambda payload: wire.unpack_predict(payload, 4)),
    wire.Kind.CANCEL: (wire.pack_cancel([1, 2**32 - 1]), wire.unpack_cancel),
    wire.Kind.RESULTS: (wire.pack_results(OUTCOMES, 1, 17), lambda payload: wire.unpack_results(payload, MODELS)),
    wire.Kind.MODEL: (wire.pack_model(1, MODEL), wire.unpack_model),
    wire.Kind.STATUS: (wire.pack_status(STATUS), lambda payload: wire.unpack_status(payload, MODEL)),
    wire.Kind.EXPLAIN: (wire.pack_explain(9, images(1, size=4)[0], 2, 1.5), lambda payload: wire.unpack_explain(payload, 4)),
    wire.Kind.EXPLANATION: (
        wire.pack_explanation(9, Explanation(HEATMAP, 2, MODEL), 1),
        lambda payload: wire.unpack_explanation(payload, MODELS),
    ),
}
every_kind = pytest.mark.parametrize("kind", wire.Kind, ids=lambda kind: kind.name)


def payload_of(frame: bytes) -> bytes:
    """The payload of one whole frame."""
    [(_, payload)] = wire.FrameReader().feed(frame)
    return payload


def test_requests_round_trip() -> None:
    """Ids, deadlines and pixels of a PREDICT frame arrive as they were sent."""
    entries = wire.unpack_predict(payload_of(wire.pack_predict(ENTRIES)), 4)
    assert [(entry.id, entry.deadline) for entry in entries] == [(1, 12.5), (2**32 - 1, math.inf)]
    for entry, sent in zip(entries, ENTRIES, strict=True):
        assert entry.images.dtype == np.uint8
        np.testing.assert_array_equal(entry.images, sent.images)


def test_outcomes_round_trip() -> None:
    """Predictions and errors of a RESULTS frame arrive with their ids, in order, beside the queue's depth."""
    outcomes, queue_depth = wire.unpack_results(payload_of(wire.pack_results(OUTCOMES, 1, 17)), MODELS)
    assert queue_depth == 17
    assert [id_ for id_, _ in outcomes] == [3, 4, 5, 6]
    for (_, outcome), (_, sent) in zip(outcomes, OUTCOMES, strict=True):
        if isinstance(sent, Prediction):
            assert isinstance(outcome, Prediction)
            np.testing.assert_array_equal(outcome.probabilities, sent.probabilities)
            assert outcome.model is MODEL
            assert (outcome.queue_s, outcome.compute_s) == (sent.queue_s, sent.compute_s)
            assert outcome.batch_size == sent.batch_size


@pytest.mark.parametrize("error", [InferenceFailed, Overloaded, DeadlineExceeded, NotReady])
@pytest.mark.parametrize("retry_after_s", [None, 1, 10**9])
def test_errors_round_trip_by_type(error: type[ServiceError], retry_after_s: int | None) -> None:
    """An error arrives as its own type; a ``Retry-After`` beyond what the frame holds is cut, never lost with its frame."""
    frame = wire.pack_results([(1, error("said there", retry_after_s=retry_after_s))], 0, 0)
    [(id_, outcome)], _ = wire.unpack_results(payload_of(frame), {})
    assert id_ == 1
    assert type(outcome) is error
    assert outcome.retry_after_s == (None if retry_after_s is None else min(retry_after_s, 65535))


def test_explanations_round_trip() -> None:
    """The question and its answer arrive whole, and so does every error that an explanation can end with."""
    id_, image, label, deadline = wire.unpack_explain(payload_of(FRAMES[wire.Kind.EXPLAIN][0]), 4)
    assert (id_, label, deadline) == (9, 2, 1.5)
    np.testing.assert_array_equal(image, images(1, size=4)[0])
    assert wire.unpack_explain(payload_of(wire.pack_explain(9, image, None, 1.5)), 4)[2] is None
    id_, explanation = wire.unpack_explanation(payload_of(FRAMES[wire.Kind.EXPLANATION][0]), MODELS)
    assert isinstance(explanation, Explanation)
    assert (id_, explanation.label, explanation.model) == (9, 2, MODEL)
    np.testing.assert_array_equal(explanation.heatmap, HEATMAP)
    for error in (InferenceFailed, Overloaded, DeadlineExceeded, NotReady, NotFound):
        id_, outcome = wire.unpack_explanation(payload_of(wire.pack_explanation(9, error("why", retry_after_s=2), 0)), MODELS)
        assert (id_, type(outcome)) == (9, error)


def test_the_model_and_the_status_round_trip() -> None:
    """What a worker knows of the engine is what the engine said."""
    assert wire.unpack_model(payload_of(wire.pack_model(1, MODEL))) == (1, MODEL)
    assert wire.unpack_status(payload_of(wire.pack_status(STATUS)), MODEL) == STATUS
    assert wire.unpack_cancel(payload_of(wire.pack_cancel([5, 2**32 - 1]))) == [5, 2**32 - 1]


def test_frames_may_be_split_at_every_byte() -> None:
    """However a stream of frames is cut in two, and byte by byte, the same frames come out, each as soon as it is whole."""
    stream = b"".join(frame for frame, _ in FRAMES.values())
    whole = list(wire.FrameReader().feed(stream))
    assert [kind for kind, _ in whole] == list(FRAMES)
    for cut in range(len(stream) + 1):
        reader = wire.FrameReader()
        assert [*reader.feed(stream[:cut]), *reader.feed(stream[cut:])] == whole
    reader = wire.FrameReader()
    assert list(itertools.chain.from_iterable(reader.feed(bytes([byte])) for byte in stream)) == whole


@every_kind
def test_a_payload_cut_short_or_too_long_is_refused(kind: wire.Kind) -> None:
    """No prefix of a payload, and no payload with a byte too many, is read as if it were whole."""
    frame, unpack = FRAMES[kind]
    payload = payload_of(frame)
    unpack(payload)
    # A list of ids has no count of its own: it is whole after every fourth byte.
    shorter = [payload[:end] for end in range(len(payload)) if kind is not wire.Kind.CANCEL or end % 4]
    for damaged in (*shorter, payload + b"\0"):
        with pytest.raises(wire.WireError):
            unpack(damaged)


@every_kind
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_payloads_raise_nothing_but_wire_errors(kind: wire.Kind, data: st.DataObject) -> None:
    """Whatever bytes a payload holds, it is read or refused; no other error comes out."""
    frame, unpack = FRAMES[kind]
    payload = bytearray(payload_of(frame))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(wire.WireError):  # what is damaged may still be sound
        unpack(bytes(payload))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20))
def test_a_stream_of_anything_is_cut_or_refused(chunks: list[bytes]) -> None:
    """Random bytes become frames or a WireError, and never more bytes than came in."""
    reader = wire.FrameReader()
    received = 0
    try:
        for chunk in chunks:
            received += sum(len(payload) for _, payload in reader.feed(chunk))
    except wire.WireError:
        return
    assert received <= sum(map(len, chunks))


@pytest.mark.parametrize("header", [b"\x05\0\0\0\0", b"\x05\0\0\0\xff", (2**30 + 1).to_bytes(4, "little") + b"\x01"])
def test_what_cannot_be_a_frame_is_refused_by_its_header(header: bytes) -> None:
    """An unknown kind or an impossible length is refused at once, and not waited for."""
    reader = wire.FrameReader()
    with pytest.raises(wire.WireError):
        list(reader.feed(wire.pack_status(STATUS) + header))


def test_answers_of_a_model_that_was_never_announced_are_refused() -> None:
    """A RESULTS frame that names an unknown model is a WireError, not an answer of another model."""
    with pytest.raises(wire.WireError):
        wire.unpack_results(payload_of(wire.pack_results(OUTCOMES, 7, 0)), MODELS)
