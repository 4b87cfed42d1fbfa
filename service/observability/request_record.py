"""One HTTP request and its outcome; metrics, the access log and the tracer read it once it is answered."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass

from service.engine.interface import Prediction

_HARMLESS = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Scope:
    """A request without its body.

    ``path`` is decoded and without the root path, names in ``headers`` are in lower case, ``client`` is the address that the
    request came from, and ``params`` are the variable segments of a route's path and its query. ``header`` returns the value of
    the first header of a name in lower case, or None. ``request_id`` is the client's ``X-Request-ID`` if that is harmless,
    else a new one.
    """

    __slots__ = ("client", "header", "headers", "method", "params", "path", "query", "request_id", "scheme")

    def __init__(
        self,
        method: str,
        path: str,
        query: bytes = b"",
        headers: list[tuple[bytes, bytes]] | None = None,
        client: str | None = None,
        scheme: str = "http",
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers or []
        self.header = dict(reversed(self.headers)).get  # the service reads six headers and more of a request
        self.client = client
        self.scheme = scheme
        self.params: dict[str, str] = {}
        sent = self.header(b"x-request-id")
        self.request_id = sent.decode("ascii") if sent is not None and _HARMLESS.fullmatch(sent) else make_request_id()


def make_request_id() -> str:
    """Return a new id of 32 hexadecimal digits, which need not be hard to guess."""
    return random.randbytes(16).hex()


@dataclass(slots=True)
class Answered:
    """One prediction of the engine within a request; times are ``time.monotonic()``, in seconds.

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
    """Filled in while the request is processed; ``status`` stays None when the client left before it was answered.

    ``refusals`` are the codes of the errors that the request, or images within it, got; ``route`` is the path's template;
    ``trace_id`` is empty unless the request is traced.
    """

    __slots__ = ("answered", "arrived", "ended", "refusals", "reported", "route", "scope", "status", "trace_id")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.arrived = self.ended = time.monotonic()
        self.route = self.trace_id = ""
        self.reported = False
        self.status: int | None = None
        self.answered: list[Answered] = []
        self.refusals: list[str] = []

    @property
    def duration_s(self) -> float:
        """From the request's arrival to its response, in seconds."""
        return self.ended - self.arrived
