"""OpenTelemetry traces of the real service, received by a collector over OTLP."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from benchmarks.servers.service_process import ServiceProcess
from service.observability.tracing import is_configured, open_tracer
from service.settings import load_settings
from tests.support.otlp_receiver import OtlpReceiver

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "20"}  # milliseconds until spans are sent
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced(receiver: OtlpReceiver, checkpoint_path: Path) -> Iterator[ServiceProcess]:
    """A service that sends its traces to ``receiver``."""
    with ServiceProcess(checkpoint_path, environment=SOON, workers=2, otlp_endpoint=receiver.url, access_log=True) as service:
        yield service


def attributes(span: Span) -> dict[str, str | int]:
    """Give a span's attributes, strings and integers."""
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def trace_of(receiver: OtlpReceiver, traceparent: str) -> dict[str, Span]:
    """Wait for the request's span, which is sent after those within it, and give its trace's spans by name."""
    _, trace_id, span_id, _ = traceparent.split("-")
    received = receiver.wait_for(lambda spans: any(span.span_id.hex() == span_id for span in spans))
    return {span.name: span for span in received if span.trace_id.hex() == trace_id}


def test_a_request_is_a_span_with_its_stages_within(
    traced: ServiceProcess, receiver: OtlpReceiver, image_paths: list[Path]
) -> None:
    """Decode, queue and compute follow each other within the request, which says how it was answered."""
    sent_ns = time.time_ns()
    headers = {**PNG, "X-Request-ID": "traced-one"}
    response = httpx.post(f"{traced.url}/predict?top_k=1", content=image_paths[0].read_bytes(), headers=headers)
    received_ns = time.time_ns()
    spans = trace_of(receiver, response.headers["traceparent"])
    assert spans.keys() == {"POST /predict", "decode", "queue", "compute"}
    request, decode, queue, compute = (spans[name] for name in ("POST /predict", "decode", "queue", "compute"))
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.parent_span_id == b""
    assert {span.parent_span_id for span in (decode, queue, compute)} == {request.span_id}
    told = attributes(request)
    assert (told["http.request.method"], told["http.route"], told["url.path"]) == ("POST", "/predict", "/predict")
    assert (told["http.response.status_code"], told["request_id"]) == (200, "traced-one")
    assert attributes(compute) == {
        "batch_size": 1,
        "images": 1,
        "model.name": response.json()["model"]["name"],
        "model.version": response.json()["model"]["version"],
    }
    clock_ns = 1_000_000  # the stages' times come from another clock, the monotonic one
    order = [sent_ns, request.start_time_unix_nano, decode.start_time_unix_nano, decode.end_time_unix_nano]
    order += [queue.end_time_unix_nano, compute.end_time_unix_nano, request.end_time_unix_nano, received_ns]
    assert all(earlier <= later + clock_ns for earlier, later in pairwise(order)), order


def test_a_trace_that_came_with_the_request_goes_on(
    traced: ServiceProcess, receiver: OtlpReceiver, image_paths: list[Path]
) -> None:
    """The request's span is a child of the caller's, and the answer names it; the access log line has the trace's id."""
    headers = {**PNG, "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=value"}
    response = httpx.post(f"{traced.url}/predict", content=image_paths[1].read_bytes(), headers=headers)
    version, trace_id, span_id, _ = response.headers["traceparent"].split("-")
    assert (version, trace_id) == ("00", TRACE_ID)
    assert response.headers["tracestate"] == "vendor=value"
    request = trace_of(receiver, response.headers["traceparent"])["POST /predict"]
    assert (request.span_id.hex(), request.parent_span_id.hex()) == (span_id, PARENT_ID)
    traced.wait_for_output(f'"trace_id": "{TRACE_ID}"')


def test_a_caller_that_does_not_sample_is_heard(
    traced: ServiceProcess, receiver: OtlpReceiver, image_paths: list[Path]
) -> None:
    """A trace whose caller decided against sampling is answered and not sent."""
    unsampled, sampled = "1" * 32, "2" * 32
    for trace_id, flags in ((unsampled, "00"), (sampled, "01")):
        headers = {**PNG, "traceparent": f"00-{trace_id}-{PARENT_ID}-{flags}"}
        for _ in range(4):  # whatever worker answers, it has sent the first before the last
            response = httpx.post(f"{traced.url}/predict", content=image_paths[2].read_bytes(), headers=headers)
            assert response.headers["traceparent"].split("-")[1] == trace_id
    trace_of(receiver, response.headers["traceparent"])
    assert not [span for span in receiver.spans if span.trace_id.hex() == unsampled]


def test_a_refused_request_says_why(traced: ServiceProcess, receiver: OtlpReceiver) -> None:
    """The error's code is the span's error type; only a fault of the service's own makes the span an error."""
    response = httpx.post(f"{traced.url}/predict", content=b"no image", headers=PNG)
    spans = trace_of(receiver, response.headers["traceparent"])
    assert spans.keys() == {"POST /predict"}
    told = attributes(spans["POST /predict"])
    assert (told["http.response.status_code"], told["error.type"]) == (422, "invalid_image")
    assert spans["POST /predict"].status.code == Status.STATUS_CODE_UNSET


def test_an_unknown_path_names_no_span(traced: ServiceProcess, receiver: OtlpReceiver) -> None:
    """A span's name comes from a short list, whatever paths clients make up."""
    response = httpx.get(f"{traced.url}/made/up")
    assert trace_of(receiver, response.headers["traceparent"]).keys() == {"GET other"}


def test_spans_name_the_service(traced: ServiceProcess, receiver: OtlpReceiver) -> None:
    """Who looks at traces of many services finds this one by its name."""
    trace_of(receiver, httpx.get(f"{traced.url}/health").headers["traceparent"])
    assert receiver.resources[-1]["service.name"] == "cifar10-prediction-service"


def test_the_standard_variables_configure_tracing_too(checkpoint_path: Path, image_paths: list[Path]) -> None:
    """The environment that every OpenTelemetry SDK reads is enough, and a stop sends what has not been sent."""
    with OtlpReceiver() as receiver:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_SERVICE_NAME": "cats",
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
        }
        with ServiceProcess(checkpoint_path, workers=1, environment=environment) as service:
            httpx.post(f"{service.url}/predict", content=image_paths[0].read_bytes(), headers=PNG)
            assert service.stop() == 0
        assert {span.name for span in receiver.spans} == {"POST /predict", "decode", "queue", "compute"}
        assert receiver.resources[0]["service.name"] == "cats"


def test_a_collector_that_is_not_there_harms_nobody(checkpoint_path: Path, image_paths: list[Path]) -> None:
    """Requests are answered, and the service stops as it should."""
    with ServiceProcess(checkpoint_path, workers=1, otlp_endpoint="http://127.0.0.1:9", environment=SOON) as service:
        for path in image_paths[:3]:
            assert httpx.post(f"{service.url}/predict", content=path.read_bytes(), headers=PNG).status_code == 200
        assert service.stop() == 0


def test_tracing_is_off_by_default_and_then_nothing_of_it_is_loaded(
    service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an endpoint there is no tracer, no header, and the SDK is not even imported."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert open_tracer(load_settings()) is None
    assert "traceparent" not in httpx.get(f"{service.url}/health").headers
    code = "import sys, service.processes.worker; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_sdk_s_own_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """``OTEL_SDK_DISABLED`` wins over any endpoint."""
    settings = load_settings(["--otlp_endpoint=http://collector:4318"])
    assert is_configured(settings)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not is_configured(settings)
