"""A tiny HTTP server that answers by a script: what a full, a starting or a foreign server would say.

Does not know: the service.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from service.schemas import Problem

LABELS = {"labels": ["cat", "dog"], "model": {"name": "pets", "version": "0123456789ab"}}
ANSWER = {"label": "cat", "score": 1.0, "predictions": [], "filename": None, "model": LABELS["model"]}


class ScriptedServer:
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
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                scripted.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                scripted.came.release()
                if self.path.startswith("/predict"):
                    scripted.predict_gate.wait()
                status, headers, body = scripted.next_answer()
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def next_answer(self) -> tuple[int, dict[str, str], Any]:
        """Give the answer to the request that has just come in."""
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if now - self._first < self._not_before_s:
            return 429, {"Retry-After": str(self._not_before_s)}, problem(429, "overloaded")
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def problem(status: int, code: str) -> dict[str, Any]:
    """Give the body of a refusal."""
    return Problem(
        type=f"urn:problem:{code}", title=code, status=status, code=code, detail="retry shortly", request_id="r1"
    ).model_dump()
