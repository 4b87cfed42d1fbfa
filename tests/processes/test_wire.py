"""The frames between workers and engine: what goes in comes out, and what is no frame is refused."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.interface import LIKELIEST, EngineStatus, Explanation, ModelInfo, Outcome, Prediction, Request
from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded, ServiceError
from service.model.images import InputSpec
from service.processes import wire
from tests.support.fake_runner import images

MODEL = ModelInfo("fake", "0123456789ab", ("cat", "dog", "horse"), InputSpec(size=4, fit="squash"), 0.25)
STATUS = EngineStatus("ready", MODEL, "cpu", "fake", 0, "amiss")
HEATMAP = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
OUTCOMES: list[tuple[int, Outcome]] = [
    (3, Prediction(np.array([[0.5, 0.25, 0.25]], np.float32), MODEL, 0.5, 0.25, 3, np.array([0.5], np.float32))),
    (4, Overloaded("full", retry_after_s=7)),
    (5, Explanation(HEATMAP, 2, MODEL)),
    (6, Prediction(np.array([[1, 0, 0], [0, 1, 0]], np.float32), MODEL, 0.0, 0.125, 3, np.array([0, 1], np.float32))),
]


def request(*numbers: int, deadline: float = 12.5, explain: int | None = None) -> Request:
    """A request of images of 4x4 pixels."""
    return Request(images(*numbers, size=4), deadline, print, explain)


def unpack(head: Any, body: bytes) -> object:
    """Read whatever frame this is."""
    if isinstance(head, dict):
        return wire.unpack_status(head)
    if head and isinstance(head[0], list) and len(head[0]) == 4 and not isinstance(head[0][2], str):
        return wire.unpack_requests(head, body, 4)
    return wire.unpack_outcomes(head, body, {MODEL.version: MODEL})


FRAMES = {
    "requests": wire.pack_requests([request(7), request(8, 9, 10)]),
    "outcomes": wire.pack_outcomes(OUTCOMES),
    "status": wire.pack_status(STATUS),
}
every_kind = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())


def read(frame: bytes) -> Any:
    """What one whole frame holds."""
    [(head, body)] = wire.FrameReader().feed(frame)
    return unpack(head, body)


def test_requests_round_trip() -> None:
    """Ids, pixels, deadlines and what is to be explained arrive as they were sent, and so does a cancelled request."""
    sent = [request(7), request(8, 9, 10, deadline=0.1 + 0.2), request(11, explain=LIKELIEST), request(12, explain=2)]
    sent[0].images = sent[0].images[:0]
    rows = read(wire.pack_requests(sent))
    assert [(id_, *rest) for id_, _, *rest in rows] == [(each.id, each.deadline, each.explain) for each in sent]
    for (_, pixels, *_), each in zip(rows, sent, strict=True):
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, each.images)


def test_outcomes_round_trip() -> None:
    """Predictions, explanations and errors arrive with their ids, in order."""
    outcomes: list[tuple[int, Outcome]] = read(wire.pack_outcomes(OUTCOMES))
    assert [id_ for id_, _ in outcomes] == [3, 4, 5, 6]
    for (_, outcome), (_, sent) in zip(outcomes, OUTCOMES, strict=True):
        if isinstance(sent, Prediction):
            assert isinstance(outcome, Prediction)
            np.testing.assert_array_equal(outcome.probabilities, sent.probabilities)
            np.testing.assert_array_equal(outcome.typicality, sent.typicality)
            assert outcome.model is MODEL
            assert (outcome.queue_s, outcome.compute_s, outcome.batch_size) == (sent.queue_s, sent.compute_s, sent.batch_size)
        elif isinstance(sent, Explanation):
            assert isinstance(outcome, Explanation)
            np.testing.assert_array_equal(outcome.heatmap, sent.heatmap)
            assert (outcome.label, outcome.model) == (2, MODEL)


@pytest.mark.parametrize("error", [InferenceFailed, Overloaded, DeadlineExceeded, NotReady])
@pytest.mark.parametrize("retry_after_s", [None, 10**9])
def test_errors_round_trip(error: type[ServiceError], retry_after_s: int | None) -> None:
    """An error arrives as its own type, with its words and its ``Retry-After``."""
    [(id_, outcome)] = read(wire.pack_outcomes([(1, error("said there", retry_after_s=retry_after_s))]))
    assert (id_, type(outcome), outcome.detail, outcome.retry_after_s) == (1, error, "said there", retry_after_s)


def test_the_status_round_trips() -> None:
    """What a worker knows of the engine is what the engine said."""
    assert read(wire.pack_status(STATUS)) == STATUS
    assert read(wire.pack_status(EngineStatus())) == EngineStatus()


def test_frames_may_be_split_at_every_byte() -> None:
    """However a stream of frames is cut in two, and byte by byte, the same frames come out, each as soon as it is whole."""
    stream = b"".join(FRAMES.values())
    whole = list(wire.FrameReader().feed(stream))
    assert len(whole) == len(FRAMES)
    for cut in range(len(stream) + 1):
        reader = wire.FrameReader()
        assert [*reader.feed(stream[:cut]), *reader.feed(stream[cut:])] == whole
    reader = wire.FrameReader()
    assert list(itertools.chain.from_iterable(reader.feed(bytes([byte])) for byte in stream)) == whole


@every_kind
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_frames_are_read_or_refused(frame: bytes, data: st.DataObject) -> None:
    """Whatever bytes a frame holds, it is read or refused; no other error comes out."""
    damaged = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(8, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(*wire.UNREADABLE):  # what is damaged may still be sound
        list(itertools.starmap(unpack, wire.FrameReader().feed(bytes(damaged))))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=20))
def test_a_stream_of_anything_is_cut_or_refused(chunks: list[bytes]) -> None:
    """Random bytes become frames or are refused."""
    reader = wire.FrameReader()
    with contextlib.suppress(*wire.UNREADABLE):
        for chunk in chunks:
            list(itertools.starmap(unpack, reader.feed(chunk)))


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff" * 8,  # an impossible length
        wire.pack_requests([request(1)])[:-1],  # of which the next byte is another frame's
        wire.pack_outcomes([(1, Prediction(np.zeros((1, 3), np.float32), ModelInfo("", "unknown", (), InputSpec()), 0, 0, 1))]),
    ],
    ids=["length", "short", "unknown model"],
)
def test_what_cannot_be_a_frame_is_refused(bad: bytes) -> None:
    """It is refused at once, and not waited for."""
    with pytest.raises(wire.UNREADABLE):
        list(itertools.starmap(unpack, wire.FrameReader().feed(bad + b"\xff" * 16)))
