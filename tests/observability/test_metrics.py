"""``GET /metrics`` of the real service with two workers, and the counting itself."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from benchmarks.servers.service_process import ServiceProcess
from service.engine.interface import Prediction
from service.errors import Overloaded
from service.observability.exposition import exposition
from service.observability.metrics import (
    ENGINE,
    FIRST_WORKER,
    METRICS,
    MODEL_RELOADS,
    OTHER,
    REFUSALS,
    REQUEST_SECONDS,
    REQUESTS,
    Metric,
    Metrics,
    Snapshot,
    make_values,
)
from service.observability.request_record import Answered, RequestRecord, Scope
from service.observability.telemetry import Telemetry
from service.routes.app import Application
from service.routes.context import ServiceContext
from service.runtime.open_runner import measure_device
from service.settings import load_settings
from tests.support.image_file import noise
from tests.support.scrape import Scrape, parse, scrape, scrape_until
from tests.support.scripted_engine import MODEL, ApplicationServer, ScriptedEngine


@pytest.fixture
def two_workers(checkpoint_path: Path) -> Iterator[ServiceProcess]:
    """A service of its own for each test, so that every count begins at 0."""
    with ServiceProcess(checkpoint_path, workers=2) as service:
        yield service


@pytest.fixture
def context() -> Iterator[ServiceContext]:
    """An application's parts, with a table of its own and nobody asking."""
    app = Application(load_settings(), ScriptedEngine())
    yield app.context
    app.close()


def collect(context: ServiceContext) -> Scrape:
    """Give what a scrape would."""
    text, _ = exposition(Snapshot(context.metrics, context.engine.status(), is_ready=True), "", {})
    return parse(text.decode())


def post(url: str, image: bytes, **headers: str) -> httpx.Response:
    """Post one image over a connection of its own, so that any worker may answer."""
    return httpx.post(f"{url}/predict", content=image, headers={"Content-Type": "image/png", **headers})


def test_counts_are_exact_after_requests_of_mixed_outcome(two_workers: ServiceProcess, image_paths: list[Path]) -> None:
    """Whatever workers answered them, every request, refusal, image and class is counted once."""
    url, images = two_workers.url, [*(path.read_bytes() for path in image_paths), noise()]
    answers = [post(url, image).json() for image in images]
    for _ in range(3):
        assert post(url, b"not an image").json()["code"] == "invalid_image"
    assert post(url, images[0], **{"Content-Type": "text/plain"}).status_code == 415
    assert post(url, images[0], **{"X-Request-Timeout-Ms": "0.000001"}).status_code == 504
    assert httpx.get(f"{url}/predict").status_code == 405
    assert httpx.get(f"{url}/nowhere").status_code == 404
    assert httpx.get(f"{url}/health").status_code == 200
    files = [("file", images[0]), ("file", b"not an image"), ("file", images[1])]
    results = httpx.post(f"{url}/predict/batch", files=files).json()["results"]
    answers += [result for result in results if "label" in result]
    labels = Counter(answer["label"] for answer in answers)
    labels[httpx.post(f"{url}/hf", content=images[2]).json()[0]["label"]] += 1
    unknown = [answer for answer in (*answers, answers[2]) if not answer["known"]]

    seen = scrape(url)

    requests = {
        ("/predict", "200"): len(images),
        ("/predict", "422"): 3,
        ("/predict", "415"): 1,
        ("/predict", "504"): 1,
        ("/predict", "405"): 1,
        ("/predict/batch", "200"): 1,
        ("/hf", "200"): 1,
        ("/health", "200"): 1,
        ("other", "404"): 1,
    }
    assert seen.series("service_requests_total", "route", "status") == requests
    assert seen.value("service_request_seconds_count") == sum(requests.values())
    assert seen.value("service_request_seconds_count", route="/predict") == len(images) + 6
    assert {reason: count for (reason,), count in seen.series("service_refusals_total", "reason").items() if count} == {
        "invalid_image": 4,
        "unsupported_media_type": 1,
        "deadline_exceeded": 1,
        "method_not_allowed": 1,
        "not_found": 1,
    }
    assert seen.value("service_deadline_misses_total") == 1
    assert seen.value("service_cancellations_total") == 0
    assert seen.value("service_requests_in_flight") == 0
    assert {label: count for (label,), count in seen.series("service_predictions_total", "label").items() if count} == labels
    assert seen.value("service_unknown_total") == len(unknown) >= 1
    for name in ("service_prediction_score", "service_typicality", "service_decode_seconds", "service_queue_seconds"):
        assert seen.value(f"{name}_count") == len(images) + 3
        assert seen.value(f"{name}_bucket", le="+Inf") == len(images) + 3
    assert seen.value("service_batch_images_sum") == len(images) + 3
    assert seen.value("service_engine_restarts_total") == seen.value("service_worker_restarts_total") == 0


def test_batching_shows(two_workers: ServiceProcess, image_paths: list[Path]) -> None:
    """Images that arrive together are counted in fewer batches than there are images, and every one of them is counted."""
    files = [("file", path.read_bytes()) for path in image_paths]
    before = scrape(two_workers.url)
    assert before.value("service_batch_images_count") == 0
    assert httpx.post(f"{two_workers.url}/predict/batch", files=files).status_code == 200
    after = scrape(two_workers.url)
    assert after.value("service_batch_images_sum") == len(files)
    assert after.value("service_batch_images_count") <= len(files) / 2
    assert after.value("service_batch_images_bucket", le="1.0") <= 1
    assert after.value("service_compute_seconds_count") == after.value("service_batch_images_count")


def test_an_engine_that_dies_is_counted_and_what_it_counted_stays(two_workers: ServiceProcess, image_paths: list[Path]) -> None:
    """The new engine counts on where the dead one stopped, and health and model are those of the new one."""
    image = image_paths[0].read_bytes()
    assert post(two_workers.url, image).status_code == 200
    os.kill(two_workers.engine_pids[-1], signal.SIGKILL)
    two_workers.wait_until_ready(times=2)
    assert post(two_workers.url, image).status_code == 200
    seen = scrape(two_workers.url)
    assert seen.value("service_engine_restarts_total") == 1
    assert seen.value("service_worker_restarts_total") == 0
    assert seen.value("service_batch_images_sum") == 2
    assert seen.value("service_requests_total", route="/predict", status="200") == 2
    assert seen.value("service_ready") == 1


def test_a_worker_that_dies_is_counted_and_leaves_nothing_in_flight(
    two_workers: ServiceProcess, image_paths: list[Path]
) -> None:
    """What a dead worker was doing is no more in flight; what it had counted stays."""
    url, image = two_workers.url, image_paths[0].read_bytes()
    for _ in range(8):
        assert post(url, image).status_code == 200
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port)) as held:
        held.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\n")
        scrape_until(url, lambda seen: seen.value("service_requests_in_flight") == 1)
        for index in range(2):
            os.kill(two_workers.worker_pids(index)[-1], signal.SIGKILL)
        two_workers.wait_until_ready(times=2)
    seen = scrape(url)
    assert seen.value("service_worker_restarts_total") == 2
    assert seen.value("service_requests_in_flight") == 0
    assert seen.value("service_requests_total", route="/predict", status="200") == 8
    assert seen.value("service_predictions_total") == 8


def test_a_client_that_leaves_is_counted(two_workers: ServiceProcess) -> None:
    """A request whose client closed the connection is a cancellation and no answer."""
    address = httpx.URL(two_workers.url)
    with socket.create_connection((address.host, address.port)) as leaving:
        leaving.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nhalf")
    seen = scrape_until(two_workers.url, lambda seen: seen.value("service_cancellations_total") == 1)
    assert seen.value("service_requests_total") == 0
    assert seen.value("service_requests_in_flight") == 0


def test_what_is_refused_before_it_is_a_request_is_counted(two_workers: ServiceProcess) -> None:
    """Bytes that are no HTTP are a refusal, though no request with a path and a status comes of them."""
    address = httpx.URL(two_workers.url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        assert b'"code":"malformed_request"' in b"".join(iter(lambda: connection.recv(4096), b""))
    seen = scrape(two_workers.url)
    assert seen.value("service_refusals_total", reason="malformed_request") == 1
    assert seen.value("service_requests_total") == 0


def test_the_model_the_processes_and_their_memory_are_told(two_workers: ServiceProcess) -> None:
    """The scrape names the model that health names, and every process holds some memory."""
    health = httpx.get(f"{two_workers.url}/health").json()
    seen = scrape(two_workers.url)
    told = {**health["model"], "runtime": health["runtime"], "device": health["device"]}
    assert seen.value("service_model_info", **told) == 1
    memory = seen.series("service_resident_memory_bytes", "process")
    assert set(memory) == {("supervisor",), ("engine",), ("worker-0",), ("worker-1",)}
    assert min(memory.values()) > 2**20


def test_every_declared_metric_is_told_as_declared(service: ServiceProcess) -> None:
    """Names, types and help are those of the registry, in the text format and in OpenMetrics."""
    declared = {name.removesuffix("_total"): (metric.kind, metric.help) for name, metric in METRICS.items()}
    told = {name: (family.type, family.documentation) for name, family in scrape(service.url).families.items()}
    assert told == declared
    response = httpx.get(f"{service.url}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    families = {family.name: (family.type, family.documentation) for family in parse_openmetrics(response.text)}  # type: ignore[no-untyped-call]
    assert families == declared


@pytest.mark.parametrize("version", ["\xff", "1.x", "2.x", "1.0.0a", "", "\xb2", "9" * 5000])
def test_a_version_that_is_none_gets_some_format(service: ServiceProcess, version: str) -> None:
    """Whatever a client says that it reads, it is answered."""
    accept = f"application/openmetrics-text; version={version}"
    response = httpx.get(f"{service.url}/metrics", headers={b"Accept": accept.encode("latin-1")})
    assert response.status_code == 200
    assert "service_requests" in response.text


def test_scrapes_do_not_count_themselves(service: ServiceProcess) -> None:
    """Two scrapes in a row, with nothing between them, count the same requests."""
    assert scrape(service.url).value("service_requests_total") == scrape(service.url).value("service_requests_total")


def test_waiting_images_readiness_and_model_are_looked_up(image_paths: list[Path]) -> None:
    """Queue depth in images, readiness and the model are what they are at the time of the scrape."""
    with ApplicationServer() as server:
        server.engine.answer = lambda images: None
        assert post(server.url, image_paths[0].read_bytes(), **{"X-Request-Timeout-Ms": "1"}).status_code == 504
        seen = scrape(server.url)
        assert seen.value("service_queue_images") == 1
        assert seen.value("service_ready") == 1
        server.supervisor.draining = True
        assert scrape(server.url).value("service_ready") == 0
        server.engine.model = None
        seen = scrape(server.url)
        assert seen.series("service_model_info", "version") == seen.series("service_predictions_total", "label") == {}


def test_refusals_of_the_engine_are_counted_by_their_code(image_paths: list[Path]) -> None:
    """An overloaded engine's refusal is counted with the code that the client sees."""
    with ApplicationServer() as server:
        server.engine.refuse = Overloaded("the queue is full", retry_after_s=1)
        assert post(server.url, image_paths[0].read_bytes()).json()["code"] == "overloaded"
        assert scrape(server.url).value("service_refusals_total", reason="overloaded") == 1


def test_bounds_of_buckets_belong_to_them(context: ServiceContext) -> None:
    """A value on a bound is in that bound's bucket, as ``le`` says, and one above all is only in the last."""
    for images in (4, 5, 10_000):
        context.metrics.observe_batch(images, 0.1)
    seen = collect(context)
    counts = {bound: seen.value("service_batch_images_bucket", le=bound) for bound in ("3.0", "4.0", "6.0", "4096.0", "+Inf")}
    assert counts == {"3.0": 0, "4.0": 1, "6.0": 2, "4096.0": 2, "+Inf": 3}
    assert seen.value("service_batch_images_sum") == 10_009


def test_what_has_no_place_of_its_own_is_counted_as_other(context: ServiceContext) -> None:
    """An unknown path, status or code never makes a series of its own: a client cannot make the table grow."""
    telemetry = Telemetry(context.metrics, ["/known"], None, None)
    record = telemetry.begin(Scope("GET", "/made-up"))
    record.status = 299
    record.refusals.append("never_heard_of")
    telemetry.end(record, [])
    seen = collect(context)
    assert seen.series("service_requests_total", "route", "status") == {("other", "other"): 1}
    assert seen.value("service_refusals_total", reason="other") == 1


def test_a_metric_that_cannot_be_counted_says_so(context: ServiceContext) -> None:
    """A label whose values nobody lists fails where it is declared, a value that a label does not have where it is counted."""
    with pytest.raises(ValueError, match="list the values of model"):
        Metric("service_made_up_total", "By model.", {"model": 8})
    assert "service_made_up_total" not in METRICS
    for values in (["exploded"], [], ["loaded", "loaded"]):
        with pytest.raises(ValueError, match=r"not in tuple|argument"):
            context.metrics.add(MODEL_RELOADS, *values)
    assert collect(context).value("service_model_reloads_total") == 0


def test_a_value_is_counted_in_the_series_of_its_labels(context: ServiceContext) -> None:
    """Each label in turn: a text of its own, or the number of a value that the service looks up."""
    context.metrics.name_routes(["/a", "/b"])
    context.metrics.add(REQUESTS, context.metrics.routes["/b"], "404")
    context.metrics.observe(REQUEST_SECONDS, 0.5, context.metrics.routes["/a"])
    seen = collect(context)
    assert seen.series("service_requests_total", "route", "status") == {("/b", "404"): 1}
    assert seen.value("service_request_seconds_sum", route="/a") == seen.value("service_request_seconds_sum") == 0.5


def test_more_routes_than_places_are_refused() -> None:
    """A table that is too small says so at the start, and does not count in the wrong place later."""
    with pytest.raises(ValueError, match="places"):
        Metrics(make_values(1), FIRST_WORKER).name_routes([f"/{index}" for index in range(64)])


def test_every_code_of_an_error_is_a_reason() -> None:
    """The tree of errors is the source of the reasons, so no refusal is told as ``other``."""
    reasons = REFUSALS.labels["reason"]
    assert isinstance(reasons, tuple)
    assert {"overloaded", "deadline_exceeded", "not_ready", "invalid_image", "internal_error"} < set(reasons)
    assert len(reasons) == len(set(reasons))


def test_images_of_one_call_count_each_for_themselves(context: ServiceContext) -> None:
    """A prediction of several images is one call with one time in the queue, and a class and a score for each image."""
    record = RequestRecord(Scope("GET", "/"))
    record.route, record.status = OTHER, 200
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]], np.float32)
    record.answered.append(Answered(None, record.arrived, Prediction(probabilities, MODEL, 0.001, 0.002, 3)))
    context.metrics.request_began()
    context.metrics.observe_request(record)
    seen = collect(context)
    assert seen.series("service_predictions_total", "label") == {("cat",): 2, ("dog",): 1, ("horse",): 0}
    assert seen.value("service_prediction_score_count") == 3
    assert seen.value("service_prediction_score_sum") == pytest.approx(2.1)
    assert seen.value("service_queue_seconds_count") == 1
    assert seen.value("service_decode_seconds_count") == 0  # pixels need no decoding
    assert seen.value("service_typicality_count") == seen.value("service_unknown_total") == 0  # the model has none


def test_what_is_not_known_is_below_the_threshold(context: ServiceContext) -> None:
    """An image whose typicality is the threshold itself is known."""
    record = RequestRecord(Scope("GET", "/"))
    record.route, record.status = OTHER, 200
    model = replace(MODEL, unknown_threshold=0.25)
    typicality = np.array([0.125, 0.25, 0.5], np.float32)
    prediction = Prediction(np.full((3, 3), 1 / 3, np.float32), model, 0.001, 0.002, 3, typicality)
    record.answered.append(Answered(None, record.arrived, prediction))
    context.metrics.request_began()
    context.metrics.observe_request(record)
    seen = collect(context)
    assert seen.value("service_unknown_total") == 1
    assert seen.value("service_typicality_count") == 3
    assert seen.value("service_typicality_sum") == 0.875


def test_the_gpu_s_memory_and_utilisation_are_told_while_its_engine_lives(context: ServiceContext) -> None:
    """What the engine measured is shown, without NVML the memory alone, and nothing after the engine's end."""
    engine = Metrics(context.metrics.values, ENGINE)
    assert collect(context).series("service_device_memory_bytes", "kind") == {}
    engine.facts.device_used_bytes, engine.facts.device_total_bytes = 3 * 2**30, 80 * 2**30
    seen = collect(context)
    assert seen.series("service_device_memory_bytes", "kind") == {("used",): 3 * 2**30, ("total",): 80 * 2**30}
    assert seen.series("service_device_utilization_ratio") == {(): 0.0}
    engine.facts.device_utilization = math.nan
    assert collect(context).series("service_device_utilization_ratio") == {}
    context.metrics.values.forget(ENGINE)
    assert collect(context).series("service_device_memory_bytes", "kind") == {}


def test_classes_beyond_the_table_are_counted_as_other(context: ServiceContext) -> None:
    """With more classes than the table has places, no other metric is counted wrongly and no scrape fails."""
    classes = 6000
    model = replace(MODEL, class_names=tuple(f"class {index}" for index in range(classes)))
    record = RequestRecord(Scope("GET", "/"))
    record.route, record.status = OTHER, 200
    probabilities = np.zeros((3, classes), np.float32)
    probabilities[0, 1041] = probabilities[1, 4500] = probabilities[2, classes - 1] = 1.0
    record.answered.append(Answered(None, record.arrived, Prediction(probabilities, model, 0.001, 0.002, 3)))
    assert isinstance(context.engine, ScriptedEngine)
    context.engine.model = model
    context.metrics.request_began()
    context.metrics.observe_request(record)
    seen = collect(context)
    counts = {label: count for (label,), count in seen.series("service_predictions_total", "label").items() if count}
    assert counts == {"class 1041": 1, "other": 2}
    assert seen.value("service_engine_restarts_total") == seen.value("service_worker_restarts_total") == 0


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    """Some of its memory is in use once anything runs on it, and utilisation is a share."""
    import torch

    held = torch.zeros(2**28, dtype=torch.uint8, device="cuda:0")
    used_bytes, total_bytes, utilization = measure_device("cuda:0")
    assert held.nbytes <= used_bytes <= total_bytes
    assert math.isnan(utilization) or 0 <= utilization <= 1
