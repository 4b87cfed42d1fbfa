"""A collector of traces: OTLP over HTTP on a free port, in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.answering_server import AnsweringServer

_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang


class OtlpReceiver(AnsweringServer):
    """Takes ``POST /v1/traces`` while the ``with`` block runs; ``resources`` are the attributes of who sent spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self._news = threading.Condition()
        super().__init__()

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Note the spans of a request."""
        assert path == "/v1/traces", path
        with self._news:
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append({item.key: item.value.string_value for item in group.resource.attributes})
                for scope in group.scope_spans:
                    self.spans.extend(scope.spans)
            self._news.notify_all()
        return 200, {"Content-Type": "application/x-protobuf"}, ExportTraceServiceResponse().SerializeToString()

    def wait_for(self, condition: Callable[[list[Span]], bool]) -> list[Span]:
        """Wait until what has arrived fulfils ``condition``; raise AssertionError after a minute."""
        with self._news:
            assert self._news.wait_for(lambda: condition(self.spans), _PATIENCE_S), f"only these spans came: {self.spans}"
            return list(self.spans)
