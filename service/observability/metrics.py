"""Every metric by name, and the only places that write them.

Owns: declarations, buckets, and ``observe_request``, ``observe_batch`` and their like, which read what requests and batches
carry. Does not know: who serves ``/metrics`` (``service.routes.metrics``), what a handler does.

Each process adds to its own row of a table in shared memory, and a scrape sums the rows. prometheus_client's own way with
many processes, files in ``PROMETHEUS_MULTIPROC_DIR``, was measured against it, in microseconds of processor time on one core
of a Xeon, with Python 3.11:

                                                     files    this table
    add one to a counter                              0.70          0.06
    observe a value in 19 buckets                     1.49          0.17
    count one ``POST /predict``                       9.6           2.0

With the record that is counted, and the layer that makes it, a request pays 4.6 in all. Files are also kept for each process
id, so they grow with every worker that is started again; a row is taken over.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from service.errors import DeadlineExceeded, InferenceFailed, Overloaded, ServiceError
from service.observability.request_record import RequestRecord
from service.observability.shared_values import SharedValues
from service.runtime.device_usage import DeviceUsage

# Fine where this service lives (0.1 to 16 ms), then coarse up to the default deadline.
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
IMAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)

OTHER = "other"  # a route, status or reason without a place of its own
STATUSES = (
    *("200", "204", "206", "301", "302", "304", "307", "308", "400", "401", "403", "404", "405", "406", "408", "411"),
    *("413", "414", "415", "416", "417", "422", "429", "431", "500", "501", "502", "503", "504", OTHER),
)


def _codes(tree: type[ServiceError]) -> Iterator[str]:
    yield tree.code
    for error in tree.__subclasses__():
        yield from _codes(error)


REASONS = (*dict.fromkeys(_codes(ServiceError)), OTHER)

RELOAD_OUTCOMES = ("loaded", "refused", "rolled_back")

# How many values of a label have a place in the table; a class of the model is found by its number.
_PLACES = {"route": 64, "status": len(STATUSES), "reason": len(REASONS), "label": 4096, "outcome": len(RELOAD_OUTCOMES)}


@dataclass(frozen=True)
class Metric:
    """One declaration.

    ``source`` says whether its numbers are in the table or are looked up by the scrape; series of a ``sparse`` metric are
    left out while they are 0.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Literal["table", "scrape"] = "table"
    sparse: bool = False

    @property
    def width(self) -> int:
        """The columns of one series: one for each bucket, one for what is above, and the sum; or the value alone."""
        return len(self.buckets) + 2 if self.buckets else 1

    @property
    def columns(self) -> int:
        """The columns of all its series."""
        return self.width * math.prod(_PLACES[label] for label in self.labels) if self.source == "table" else 0


METRICS: dict[str, Metric] = {
    "service_requests_total": Metric(
        "counter", "HTTP requests answered, by route and status; scrapes are not counted.", ("route", "status"), sparse=True
    ),
    "service_request_seconds": Metric(
        "histogram", "Time from a request's arrival to the end of its answer, by route.", ("route",), SECONDS, sparse=True
    ),
    "service_requests_in_flight": Metric("gauge", "HTTP requests that are being answered."),
    "service_refusals_total": Metric(
        "counter", "Requests, and images within a request, that were answered with an error, by its code.", ("reason",)
    ),
    "service_deadline_misses_total": Metric("counter", "Requests and images refused because of their deadline."),
    "service_cancellations_total": Metric("counter", "Requests whose client left before the answer began."),
    "service_decode_seconds": Metric(
        "histogram", "Time to decode the images of one call of the engine, mostly one.", (), SECONDS
    ),
    "service_queue_seconds": Metric("histogram", "Time in the engine's queue, for each call of the engine.", (), SECONDS),
    "service_queue_images": Metric("gauge", "Images that wait for the device.", source="scrape"),
    "service_compute_seconds": Metric("histogram", "Time on the device, for each batch.", (), SECONDS),
    "service_batch_images": Metric("histogram", "Images in a batch.", (), IMAGES),
    "service_predictions_total": Metric("counter", "Images answered, by predicted class.", ("label",)),
    "service_prediction_score": Metric("histogram", "Probability of the predicted class.", (), SCORES),
    "service_ready": Metric("gauge", "1 when a prediction would be answered, else 0.", source="scrape"),
    "service_model_info": Metric(
        "gauge", "1, for the model that serves now.", ("name", "version", "runtime", "device"), source="scrape"
    ),
    "service_engine_restarts_total": Metric("counter", "Times the engine process was started again after its death."),
    "service_worker_restarts_total": Metric("counter", "Times a worker process was started again after its death."),
    "service_model_reloads_total": Metric("counter", "New checkpoints that were loaded, refused or rolled back.", ("outcome",)),
    "service_resident_memory_bytes": Metric("gauge", "Memory that each process holds.", ("process",), source="scrape"),
    "service_device_memory_bytes": Metric(
        "gauge", "Memory of the GPU, used by anybody and total; absent without a GPU.", ("kind",), source="scrape"
    ),
    "service_device_utilization_ratio": Metric(
        "gauge", "Share of recent time in which the GPU computed, by NVML; absent without a GPU.", source="scrape"
    ),
}

# The first columns are for the statistics of /v2 alone; the metrics follow.
LAST_ANSWER, ANSWERED_COMPUTE_S, FAILURES, FAILURE_S, COLUMNS = range(5)
FIRST_COLUMN: dict[str, int] = {}
for _name, _metric in METRICS.items():
    FIRST_COLUMN[_name] = COLUMNS
    COLUMNS += _metric.columns
METRICS_PATH = "/metrics"
SUPERVISOR, ENGINE, FIRST_WORKER = range(3)  # rows

_REQUESTS = FIRST_COLUMN["service_requests_total"]
_REQUEST_SECONDS = FIRST_COLUMN["service_request_seconds"]
_IN_FLIGHT = FIRST_COLUMN["service_requests_in_flight"]
_REFUSALS = FIRST_COLUMN["service_refusals_total"]
_DEADLINE_MISSES = FIRST_COLUMN["service_deadline_misses_total"]
_CANCELLATIONS = FIRST_COLUMN["service_cancellations_total"]
_DECODE_SECONDS = FIRST_COLUMN["service_decode_seconds"]
_QUEUE_SECONDS = FIRST_COLUMN["service_queue_seconds"]
_COMPUTE_SECONDS = FIRST_COLUMN["service_compute_seconds"]
_BATCH_IMAGES = FIRST_COLUMN["service_batch_images"]
_PREDICTIONS = FIRST_COLUMN["service_predictions_total"]
_PREDICTION_SCORE = FIRST_COLUMN["service_prediction_score"]
_ENGINE_RESTARTS = FIRST_COLUMN["service_engine_restarts_total"]
_MODEL_RELOADS = FIRST_COLUMN["service_model_reloads_total"]
_WORKER_RESTARTS = FIRST_COLUMN["service_worker_restarts_total"]

# The errors of a request that was sound and came to the engine.
_FAILURE_REASONS = frozenset(error.code for error in (DeadlineExceeded, InferenceFailed, Overloaded))
_LAST_CLASS = _PLACES["label"] - 1  # shared as ``other`` by all classes that have no place of their own
_SECONDS_WIDTH = METRICS["service_request_seconds"].width
_STATUS = {int(status): index for index, status in enumerate(STATUSES) if status != OTHER}
_REASON = {reason: index for index, reason in enumerate(REASONS)}


def make_values(workers: int) -> SharedValues:
    """Make the table for the supervisor, the engine and this many workers."""
    return SharedValues(FIRST_WORKER + workers, COLUMNS)


def row_name(row: int) -> str:
    """Name the process that has row ``row``."""
    return {SUPERVISOR: "supervisor", ENGINE: "engine"}.get(row, f"worker-{row - FIRST_WORKER}")


def class_labels(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Values of the label ``label`` in the order of their places; classes beyond the table share ``other``."""
    return class_names if len(class_names) <= _PLACES["label"] else (*class_names[:_LAST_CLASS], OTHER)


class Metrics:
    """One process's row of the table, written on the process's event loop alone."""

    def __init__(self, values: SharedValues, row: int) -> None:
        """Take row ``row`` for this process."""
        self.values = values
        self.facts = values.facts(row)
        self.facts.process_id = os.getpid()
        self._cells = values.row(row)
        self.name_routes(())

    def name_routes(self, paths: Sequence[str]) -> None:
        """Say which paths have series of their own, in the same order in every worker; the others share one."""
        self.routes = (*paths, OTHER)
        if len(self.routes) > _PLACES["route"]:
            raise ValueError(f"{len(paths)} routes need more places than the {_PLACES['route']} that the table has")
        self._route = {path: index for index, path in enumerate(self.routes)}

    def request_began(self) -> None:
        """Count a request in."""
        self._cells[_IN_FLIGHT] += 1.0

    def observe_request(self, record: RequestRecord) -> None:
        """Count a request out, with all that its record tells."""
        cells = self._cells
        cells[_IN_FLIGHT] -= 1.0
        if record.status is None:
            cells[_CANCELLATIONS] += 1.0
        else:
            route = self._route.get(record.route, len(self.routes) - 1)
            cells[_REQUESTS + route * len(STATUSES) + _STATUS.get(record.status, len(STATUSES) - 1)] += 1.0
            _observe(cells, _REQUEST_SECONDS + route * _SECONDS_WIDTH, SECONDS, record.duration_s)
        for code in record.refusals:
            self.refused(code)
        if not record.answered and not _FAILURE_REASONS.isdisjoint(record.refusals):
            cells[FAILURES] += 1.0
            cells[FAILURE_S] += record.duration_s
        for answered in record.answered:
            prediction = answered.prediction
            cells[LAST_ANSWER] = time.time()
            cells[ANSWERED_COMPUTE_S] += prediction.compute_s
            if answered.began is not None:
                _observe(cells, _DECODE_SECONDS, SECONDS, answered.decode_s)
            _observe(cells, _QUEUE_SECONDS, SECONDS, prediction.queue_s)
            for scores in prediction.probabilities.tolist():
                score = max(scores)
                cells[_PREDICTIONS + min(scores.index(score), _LAST_CLASS)] += 1.0
                _observe(cells, _PREDICTION_SCORE, SCORES, score)

    def refused(self, code: str) -> None:
        """Count the refusal of a request, or of one image of it, by its error's code."""
        self._cells[_REFUSALS + _REASON.get(code, len(REASONS) - 1)] += 1.0
        if code == "deadline_exceeded":
            self._cells[_DEADLINE_MISSES] += 1.0

    def observe_batch(self, images: int, compute_s: float) -> None:
        """Count one batch that ran on the device."""
        _observe(self._cells, _BATCH_IMAGES, IMAGES, images)
        _observe(self._cells, _COMPUTE_SECONDS, SECONDS, compute_s)

    def observe_device(self, usage: DeviceUsage) -> None:
        """Note how much of the GPU is in use."""
        self.facts.device_used_bytes = usage.used_bytes
        self.facts.device_total_bytes = usage.total_bytes
        self.facts.device_utilization = math.nan if usage.utilization is None else usage.utilization

    def model_reloaded(self, outcome: str) -> None:
        """Count a new checkpoint by what became of it, one of ``RELOAD_OUTCOMES``."""
        self._cells[_MODEL_RELOADS + RELOAD_OUTCOMES.index(outcome)] += 1.0

    def engine_restarted(self) -> None:
        """Count an engine started in the place of a dead one."""
        self._cells[_ENGINE_RESTARTS] += 1.0

    def worker_restarted(self) -> None:
        """Count a worker started in the place of a dead one."""
        self._cells[_WORKER_RESTARTS] += 1.0

    def process_ended(self, row: int) -> None:
        """Forget what was true only while the process of ``row`` ran; what it has counted stays."""
        self.values.row(row)[_IN_FLIGHT] = 0.0
        self.values.forget(row)


def _observe(cells: memoryview[float], column: int, buckets: tuple[float, ...], value: float) -> None:
    cells[column + bisect_left(buckets, value)] += 1.0
    cells[column + len(buckets) + 1] += value
