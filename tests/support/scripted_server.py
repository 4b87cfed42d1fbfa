"""A tiny HTTP server that answers by a script: what a full, a starting or a foreign server would say."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from service.schemas import Problem
from tests.support.answering_server import AnsweringServer

LABELS = {"labels": ["cat", "dog"], "model": {"name": "pets", "version": "0123456789ab"}}
ANSWER = {"label": "cat", "score": 1.0, "predictions": [], "filename": None, "model": LABELS["model"]}


class ScriptedServer(AnsweringServer):
    """A server on a free port that gives one ``(status, headers, body)`` of ``script`` after the other, and then the last.

    With ``not_before_s`` it refuses with 429 and that ``Retry-After`` whatever comes before so many seconds have passed.
    """

    def __init__(self, *script: tuple[int, dict[str, str], Any], not_before_s: int = 0) -> None:
        self.predict_gate = threading.Event()  # closed by clear(): predictions wait for it
        self.predict_gate.set()
        self.came = threading.Semaphore(0)  # one for each request
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._script = list(script)
        self._not_before_s = not_before_s
        self._first: float | None = None
        super().__init__()

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Give the next answer of the script."""
        self.requests.append((path, headers))
        self.came.release()
        if path.startswith("/predict"):
            self.predict_gate.wait()
        status, answered, content = self._next_answer()
        return status, answered, content if isinstance(content, bytes) else json.dumps(content).encode()

    def _next_answer(self) -> tuple[int, dict[str, str], Any]:
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if now - self._first < self._not_before_s:
            return 429, {"Retry-After": str(self._not_before_s)}, problem(429, "overloaded")
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]


def problem(status: int, code: str) -> dict[str, Any]:
    """Give the body of a refusal."""
    return Problem(
        type=f"urn:problem:{code}", title=code, status=status, code=code, detail="retry shortly", request_id="r1"
    ).model_dump()
