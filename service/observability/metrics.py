"""Every metric, declared once, and one process's way to count.

To add a metric, declare it below and call ``Metrics.add`` or ``Metrics.observe`` where it happens. Its place in shared memory,
``/metrics``, the table in the documentation and the tests derive from the declaration.

Each process adds to its own row of a table in shared memory, and a scrape sums the rows. prometheus_client's own way with
many processes, files in ``PROMETHEUS_MULTIPROC_DIR``, was measured against it, in microseconds of processor time on one core
of a Xeon, with Python 3.11:

                                                     files    this table
    add one to a counter                              0.70          0.06
    observe a value in 19 buckets                     1.49          0.17
    count one ``POST /predict``                       9.6           2.0

Files are also kept for each process id, so they grow with every worker that is restarted; a row is reused.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import EngineStatus
from service.errors import ERRORS, DeadlineExceeded, InferenceFailed, Overloaded
from service.observability.request_record import RequestRecord
from service.observability.shared_values import SharedValues

METRICS_PATH = "/metrics"
SUPERVISOR, ENGINE, FIRST_WORKER = range(3)  # rows
OTHER = "other"  # a route, status, reason or class without a column of its own

# Fine where this service lives (0.1 to 16 ms), then coarse up to the default deadline.
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
IMAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
TYPICALITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_STATUS = {status.value: index for index, status in enumerate(HTTPStatus)}
_STATUSES = len(_STATUS)  # and OTHER
_ROUTES, _CLASSES = 64, 4096
_LOOKED_UP = {"route": _ROUTES, "label": _CLASSES}  # columns of the labels whose values are known only when the service runs

Samples = Iterable[tuple[tuple[str, ...], float]]  # label values, number


class Snapshot:
    """The service at the moment of a scrape: the sums of the table, and what is read elsewhere."""

    def __init__(self, metrics: Metrics, engine: EngineStatus, is_ready: bool) -> None:
        self.values = metrics.values
        self.sums: NDArray[np.float64] = metrics.values.table().sum(0)
        self.engine: EngineStatus = engine
        self.is_ready: bool = is_ready
        names = () if engine.model is None else engine.model.class_names
        classes = names if len(names) <= _CLASSES else (*names[: _CLASSES - 1], OTHER)
        self.label_values: Mapping[str, Sequence[str]] = {"route": tuple(metrics.routes), "label": classes}


METRICS: dict[str, Metric] = {}

# The first columns are for the statistics of /v2 alone.
LAST_ANSWER, ANSWERED_COMPUTE_S, FAILURES, FAILURE_S, _FIRST_METRIC = range(5)


def _columns() -> int:
    return _FIRST_METRIC + sum(metric.columns for metric in METRICS.values())


@dataclass(slots=True, eq=False)
class Metric:
    """One declaration, entered in ``METRICS``. The kind follows from the name, as Prometheus has it, and the buckets.

    ``labels`` has each label's values in the order of their columns, OTHER among them where there may be more, or the number of
    columns of a label that is looked up in ``Snapshot.label_values``. A metric with ``read`` has no columns: a scrape reads its
    samples. A ``sparse`` metric leaves out series that are 0. Its columns begin at ``first``.
    """

    name: str
    help: str
    labels: Mapping[str, Sequence[str] | int] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    read: Callable[[Snapshot], Samples] | None = None
    sparse: bool = False
    first: int = field(init=False, default_factory=_columns)
    width: int = field(init=False)  # the columns of one series: its value; or one for each bucket, what is above, and the sum

    def __post_init__(self) -> None:
        """Raise ValueError for a label whose values are neither listed nor looked up."""
        for label, values in self.labels.items():
            if isinstance(values, int) and _LOOKED_UP.get(label) != values:
                raise ValueError(f"{self.name}: list the values of {label}; only {', '.join(_LOOKED_UP)} are looked up")
        self.width = len(self.buckets) + 2 if self.buckets else 1
        METRICS[self.name] = self

    @property
    def kind(self) -> str:
        """The type that Prometheus is told."""
        return "histogram" if self.buckets else "counter" if self.name.endswith("_total") else "gauge"

    @property
    def columns(self) -> int:
        """The columns of all series."""
        places = (values if isinstance(values, int) else len(values) for values in self.labels.values())
        return 0 if self.read else self.width * math.prod(places)

    def series(self, *values: str | int) -> int:
        """Return the number of the series with these values, one for each label; the value of a looked-up label is its number.

        Another text than those of a label counts as OTHER; raises ValueError where there is no OTHER, and for a missing value.
        """
        series = 0
        for value, known in zip(values, self.labels.values(), strict=True):
            if isinstance(known, int):
                series = series * known + min(int(value), known - 1)
            else:
                series = series * len(known) + known.index(value if value in known else OTHER)
        return series

    def observe(self, cells: memoryview[float], value: float, series: int = 0) -> None:
        """Add one value to series number ``series`` of a histogram."""
        column = self.first + series * self.width
        cells[column + bisect_left(self.buckets, value)] += 1.0
        cells[column + self.width - 1] += value

    def cells(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return this metric's part of the table's sums, float64 (series, width)."""
        return sums[self.first : self.first + self.columns].reshape(-1, self.width)

    def samples(self, now: Snapshot) -> Iterator[tuple[tuple[str, ...], list[float]]]:
        """Return the label values and the ``width`` numbers of each series."""
        if self.read is not None:
            yield from ((labels, [value]) for labels, value in self.read(now))
            return
        every = [now.label_values[label] if isinstance(values, int) else values for label, values in self.labels.items()]
        for labels, cells in zip(itertools.product(*every), self.cells(now.sums).tolist(), strict=False):
            if not self.sparse or any(cells):
                yield labels, cells


def _in_flight(now: Snapshot) -> Samples:
    yield (), sum(now.values.facts(row).requests for row in range(now.values.rows))


def _model_info(now: Snapshot) -> Samples:
    if (model := now.engine.model) is not None:
        yield (model.name, model.version, now.engine.runtime, now.engine.device), 1.0


def _resident_memory(now: Snapshot) -> Samples:
    """Read the memory of every process that has a row, in bytes; on Linux only."""
    for row in range(now.values.rows):
        try:
            pages = int(Path(f"/proc/{now.values.facts(row).process_id}/statm").read_text().split()[1])
        except OSError:  # there is none, or it has just ended
            continue
        name = {SUPERVISOR: "supervisor", ENGINE: "engine"}.get(row, f"worker-{row - FIRST_WORKER}")
        yield (name,), float(pages * os.sysconf("SC_PAGE_SIZE"))


def _device_memory(now: Snapshot) -> Samples:
    engine = now.values.facts(ENGINE)
    if engine.device_total_bytes:
        yield ("used",), engine.device_used_bytes
        yield ("total",), engine.device_total_bytes


def _device_utilization(now: Snapshot) -> Samples:
    engine = now.values.facts(ENGINE)
    if engine.device_total_bytes and not math.isnan(engine.device_utilization):
        yield (), engine.device_utilization


_BY_ROUTE = {"route": _ROUTES}
_BY_STATUS: dict[str, Sequence[str] | int] = {**_BY_ROUTE, "status": (*map(str, _STATUS), OTHER)}
_BY_CODE = {"reason": (*dict.fromkeys(error.code for error in ERRORS), OTHER)}
_OUTCOMES = {"outcome": ("loaded", "refused", "rolled_back")}
_MODEL = dict.fromkeys(("name", "version", "runtime", "device"), ())

REQUESTS = Metric("service_requests_total", "HTTP requests answered; scrapes are not counted.", _BY_STATUS, sparse=True)
REQUEST_SECONDS = Metric(
    "service_request_seconds", "Time from a request's arrival to the end of its response.", _BY_ROUTE, SECONDS, sparse=True
)
Metric("service_requests_in_flight", "HTTP requests that are being answered.", read=_in_flight)
REFUSALS = Metric("service_refusals_total", "Requests, and images in a request, answered with an error, by code.", _BY_CODE)
Metric(
    "service_deadline_misses_total",
    "Requests and images refused because of their deadline.",
    read=lambda now: [((), now.sums[REFUSALS.first + REFUSALS.series(DeadlineExceeded.code)])],
)
CANCELLATIONS = Metric("service_cancellations_total", "Requests whose client left before the response began.")
DECODE_SECONDS = Metric("service_decode_seconds", "Time to decode the images of one engine call, mostly one.", {}, SECONDS)
QUEUE_SECONDS = Metric("service_queue_seconds", "Time in the engine's queue, for each engine call.", {}, SECONDS)
Metric("service_queue_images", "Images that wait for the device.", read=lambda now: [((), now.engine.queue_depth)])
COMPUTE_SECONDS = Metric("service_compute_seconds", "Time on the device, for each batch.", {}, SECONDS)
BATCH_IMAGES = Metric("service_batch_images", "Images in a batch.", {}, IMAGES)
PREDICTIONS = Metric("service_predictions_total", "Images answered, by predicted class.", {"label": _CLASSES})
PREDICTION_SCORE = Metric("service_prediction_score", "Probability of the predicted class.", {}, SCORES)
TYPICALITY = Metric("service_typicality", "Typicality of each image, of a model that measures it.", {}, TYPICALITIES)
UNKNOWN = Metric("service_unknown_total", "Images whose typicality was below the model's threshold.")
Metric("service_ready", "1 when a prediction would be answered, else 0.", read=lambda now: [((), now.is_ready)])
Metric("service_model_info", "1, for the model that serves now.", _MODEL, read=_model_info)
ENGINE_RESTARTS = Metric("service_engine_restarts_total", "Restarts of the engine process after its death.")
WORKER_RESTARTS = Metric("service_worker_restarts_total", "Restarts of worker processes after their death.")
MODEL_RELOADS = Metric("service_model_reloads_total", "New checkpoints that were loaded, refused or rolled back.", _OUTCOMES)
Metric("service_resident_memory_bytes", "Memory of each process.", {"process": ()}, read=_resident_memory)
Metric(
    "service_device_memory_bytes",
    "GPU memory used by any program, and total; only on a GPU.",
    {"kind": ()},
    read=_device_memory,
)
Metric("service_device_utilization_ratio", "Share of recent time in which the GPU computed, by NVML.", read=_device_utilization)

# The errors of a request that was sound and reached the engine.
_FAILURE_REASONS = frozenset(error.code for error in (DeadlineExceeded, InferenceFailed, Overloaded))


def make_values(workers: int) -> SharedValues:
    """Make the table for the supervisor, the engine and this many workers."""
    return SharedValues(FIRST_WORKER + workers, _columns())


class Metrics:
    """One process's row of the table, written on the process's event loop alone."""

    def __init__(self, values: SharedValues, row: int) -> None:
        self.values = values
        self.facts = values.facts(row)
        self.facts.process_id = os.getpid()
        self._cells = values.row(row)
        self.name_routes(())

    def name_routes(self, paths: Sequence[str]) -> None:
        """Set the paths that have series of their own, in the same order in every worker; all others share one."""
        if len(paths) >= _ROUTES:
            raise ValueError(f"{len(paths)} routes need more places than the {_ROUTES} that the table has")
        self.routes = {path: index for index, path in enumerate((*paths, OTHER))}

    def add(self, metric: Metric, *labels: str | int) -> None:
        """Add 1 to a counter, to the series of these ``labels``; see ``Metric.series``."""
        self._cells[metric.first + metric.series(*labels)] += 1.0

    def observe(self, metric: Metric, value: float, *labels: str | int) -> None:
        """Add ``value`` to a histogram, as ``add`` does to a counter."""
        metric.observe(self._cells, value, metric.series(*labels))

    def request_began(self) -> None:
        """Count a request in."""
        self.facts.requests += 1

    def observe_request(self, record: RequestRecord) -> None:
        """Count a request out, and everything that its record holds; its route is one of ``routes``."""
        cells = self._cells
        self.facts.requests -= 1
        if record.status is None:
            cells[CANCELLATIONS.first] += 1.0
        else:
            route = self.routes[record.route]
            cells[REQUESTS.first + route * (_STATUSES + 1) + _STATUS.get(record.status, _STATUSES)] += 1.0
            REQUEST_SECONDS.observe(cells, record.ended - record.arrived, route)
        for code in record.refusals:
            self.add(REFUSALS, code)
        if not record.answered and not _FAILURE_REASONS.isdisjoint(record.refusals):
            cells[FAILURES] += 1.0
            cells[FAILURE_S] += record.duration_s
        for answered in record.answered:
            prediction = answered.prediction
            cells[LAST_ANSWER] = time.time()
            cells[ANSWERED_COMPUTE_S] += prediction.compute_s
            if answered.began is not None:
                DECODE_SECONDS.observe(cells, answered.submitted - answered.began)
            QUEUE_SECONDS.observe(cells, prediction.queue_s)
            for scores in prediction.probabilities.tolist():
                score = max(scores)
                cells[PREDICTIONS.first + min(scores.index(score), _CLASSES - 1)] += 1.0
                PREDICTION_SCORE.observe(cells, score)
            if prediction.typicality is not None:
                for typicality in prediction.typicality.tolist():
                    TYPICALITY.observe(cells, typicality)
                    if typicality < (prediction.model.unknown_threshold or 0.0):
                        cells[UNKNOWN.first] += 1.0

    def observe_batch(self, images: int, compute_s: float) -> None:
        """Count one batch that ran on the device."""
        self.observe(BATCH_IMAGES, images)
        self.observe(COMPUTE_SECONDS, compute_s)
