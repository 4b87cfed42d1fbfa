"""A collector of traces: OTLP over HTTP on a free port, in this process.

Owns: receiving spans and waiting for them. Does not know: who sends which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span

_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang


class OtlpReceiver:
    """Takes ``POST /v1/traces`` while the ``with`` block runs; ``resources`` are the attributes of who sent spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self._news = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver._receive(self.path, ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="otlp-receiver")
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        """Start it."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait_for(self, condition: Callable[[list[Span]], bool]) -> list[Span]:
        """Wait until what has arrived fulfils ``condition``; raise AssertionError after a minute."""
        with self._news:
            assert self._news.wait_for(lambda: condition(self.spans), _PATIENCE_S), f"only these spans came: {self.spans}"
            return list(self.spans)

    def _receive(self, path: str, request: ExportTraceServiceRequest) -> None:
        assert path == "/v1/traces", path
        with self._news:
            for group in request.resource_spans:
                self.resources.append({item.key: item.value.string_value for item in group.resource.attributes})
                for scope in group.scope_spans:
                    self.spans.extend(scope.spans)
            self._news.notify_all()
