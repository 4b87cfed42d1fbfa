"""OpenTelemetry spans of requests: ``decode``, ``queue`` and ``compute`` within the request's own, sent by OTLP over HTTP.

Off unless ``otlp_endpoint`` or the standard ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set, and then the SDK is not even
imported; the other ``OTEL_*`` variables (sampler, resource, headers, batching) are the SDK's to read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import time
from typing import TYPE_CHECKING

from service.observability.request_record import Answered, RequestRecord
from service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from opentelemetry.util.types import Attributes

SERVICE_NAME = "cifar10-prediction-service"
_CLOSE_S = 2.0
_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def is_configured(settings: Settings) -> bool:
    """Whether spans are wanted: an endpoint is set, and ``OTEL_SDK_DISABLED`` is not."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return bool(settings.otlp_endpoint) or any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)


def check_tracing(settings: Settings) -> None:
    """Raise SettingsError when spans are wanted and the packages for them are missing."""
    if is_configured(settings):
        with contextlib.suppress(ModuleNotFoundError):  # of a parent package
            if importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None:
                return
        raise SettingsError("tracing is configured and OpenTelemetry is not installed; pip install '.[tracing]'")


def open_tracer(settings: Settings) -> Tracer | None:
    """Make the tracer of this process, or None when tracing is off; it starts a thread, so call it after any fork."""
    return Tracer(settings) if is_configured(settings) else None


class Tracer:
    """Spans of one process; ``close`` sends what has not been sent."""

    def __init__(self, settings: Settings) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        endpoint = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces" if settings.otlp_endpoint else None
        name = os.environ.get("OTEL_SERVICE_NAME", SERVICE_NAME)
        # Not the global provider: newer versions of FastAPI would add spans of their own to that one.
        self._provider = TracerProvider(resource=Resource.create({"service.name": name, "process.pid": os.getpid()}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer(__name__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace  # which is not imported where there is no tracer
        self._spans: dict[RequestRecord, Span] = {}

    def begin(self, record: RequestRecord) -> None:
        """Start the request's span, as a child of the ``traceparent`` that came with it, if one did."""
        names = ("traceparent", "tracestate")
        sent = {name: value.decode("latin-1") for name in names if (value := record.scope.header(name.encode()))}
        method = record.scope.method
        span = self._tracer.start_span(
            method,
            self._propagator.extract(sent),
            self._trace.SpanKind.SERVER,
            {"http.request.method": method, "url.path": record.scope.path, "url.scheme": record.scope.scheme},
            start_time=_epoch_ns(record.arrived),
        )
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        self._spans[record] = span

    def end(self, record: RequestRecord) -> list[tuple[bytes, bytes]]:
        """End the request's span and make its children from the times in the record.

        Return the ``traceparent`` (and ``tracestate``) of the span, as headers, so that a client can find it.
        """
        span = self._spans.pop(record)
        context = self._trace.set_span_in_context(span)
        if span.is_recording():
            span.update_name(f"{record.scope.method} {record.route}")
            span.set_attribute("http.route", record.route)
            span.set_attribute("request_id", record.scope.request_id)
            if record.status is not None:
                span.set_attribute("http.response.status_code", record.status)
            if record.refusals:
                span.set_attribute("error.type", record.refusals[0])
            if record.status is None or record.status >= 500:
                span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
            for answered in record.answered:
                self._add_stages(context, answered)
        span.end(_epoch_ns(record.ended))
        headers: dict[str, str] = {}
        self._propagator.inject(headers, context)
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    def _add_stages(self, parent: Context, answered: Answered) -> None:
        """Add the spans of one engine call.

        The engine reports how long a call waited and ran, not when: the wait is assumed to start when the engine was called,
        so the two hops between the processes show as a gap after ``compute``.
        """
        prediction, submitted = answered.prediction, answered.submitted
        started = submitted + prediction.queue_s
        model: dict[str, str | int] = {
            "batch_size": prediction.batch_size,
            "images": len(prediction.probabilities),
            "model.name": prediction.model.name,
            "model.version": prediction.model.version,
        }
        if answered.began is not None:
            self._add("decode", parent, answered.began, submitted)
        self._add("queue", parent, submitted, started)
        self._add("compute", parent, started, started + prediction.compute_s, model)

    def _add(self, name: str, parent: Context, began: float, ended: float, attributes: Attributes = None) -> None:
        self._tracer.start_span(name, parent, attributes=attributes, start_time=_epoch_ns(began)).end(_epoch_ns(ended))

    def close(self) -> None:
        """Send what is left and stop; a collector that does not answer delays the stop by at most two seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def _epoch_ns(monotonic_s: float) -> int:
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
