"""What one HTTP request left behind: when it came, what became of its images, how it was answered.

Owns: the record, and finding that of a request. Does not know: who reads it; metrics, the access log and the tracer do, when
the answer is out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.types import Scope

from service.engine.interface import Prediction

_KEY = "service.observability.request_record"


@dataclass(slots=True)
class Answered:
    """One answer of the engine within a request; times are ``time.monotonic()``, in seconds.

    ``began`` is when decoding began, None where nothing was encoded; ``submitted`` is when the engine was asked.
    """

    began: float | None
    submitted: float
    prediction: Prediction

    @property
    def decode_s(self) -> float:
        """How long decoding took, in seconds, the wait for a decoding thread included."""
        return 0.0 if self.began is None else self.submitted - self.began


class RequestRecord:
    """Filled in while the request is worked on; ``status`` stays None when the client left before an answer began.

    ``refusals`` are the codes of the errors that the request, or images within it, got; ``route`` is the path's template;
    ``trace_id`` is empty unless the request is traced.
    """

    __slots__ = ("answered", "arrived", "ended", "refusals", "route", "scope", "status", "told", "trace_id")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.arrived = self.ended = time.monotonic()
        self.route = self.trace_id = ""
        self.told = False
        self.status: int | None = None
        self.answered: list[Answered] = []
        self.refusals: list[str] = []

    @property
    def duration_s(self) -> float:
        """From the request's arrival to the end of its answer, in seconds."""
        return self.ended - self.arrived


def begin_record(scope: Scope) -> RequestRecord:
    """Make the record of the request that ``scope`` is of."""
    record = scope[_KEY] = RequestRecord(scope)
    return record


def end_record(record: RequestRecord) -> None:
    """Let the request go of its record: they hold each other, and would wait for the garbage collector."""
    record.scope.pop(_KEY, None)


def note_answered(scope: Scope, prediction: Prediction, submitted: float, began: float | None = None) -> None:
    """Note an answer of the engine in the request's record, if there is one; see ``Answered``."""
    record: RequestRecord | None = scope.get(_KEY)
    if record is not None:
        record.answered.append(Answered(began, submitted, prediction))


def note_refused(scope: Scope, code: str) -> None:
    """Note in the request's record, if there is one, that it or one image of it gets the error with this code."""
    record: RequestRecord | None = scope.get(_KEY)
    if record is not None:
        record.refusals.append(code)
