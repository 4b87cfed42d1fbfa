"""``GET /metrics``: the sums of the table that all processes count in, and what only a look can tell, for Prometheus.

Owns: the way from the table to samples. Does not know: who counts what.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from service.observability.metrics import (
    ENGINE,
    FIRST_COLUMN,
    METRICS,
    METRICS_PATH,
    REASONS,
    RELOAD_OUTCOMES,
    STATUSES,
    Metric,
    class_labels,
    row_name,
)
from service.routes.context import ServiceContext

Samples = Iterable[tuple[tuple[str, ...], float]]  # label values and the value of each series


def metrics_router(context: ServiceContext) -> APIRouter:
    """Declare the route over ``context``; any worker answers for all processes."""
    router = APIRouter(tags=["metrics"])
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(context))
    text = {"schema": {"type": "string"}}

    @router.get(
        METRICS_PATH,
        summary="Counts and times of all processes, for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": text, "application/openmetrics-text": text}}},
    )
    async def metrics(request: Request) -> Response:
        try:
            body, content_type = _encode(registry, request.headers.get("accept", ""))
        except TypeError:  # the library compares what the client calls a version with numbers
            body, content_type = _encode(registry, "")
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    return router


def _encode(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Give the metrics in the format that an Accept header asks for, and its Content-Type."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class ServiceCollector(Collector):
    """Makes every metric of ``service.observability.metrics.METRICS``, in that order, as prometheus_client wants it."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def collect(self) -> Iterator[Family]:
        """Give every metric as it is now."""
        sums = self._context.metrics.values.table().sum(0)
        for name, metric in METRICS.items():
            if metric.source == "scrape":
                gauge = GaugeMetricFamily(name, metric.help, labels=metric.labels)
                for labels, value in _LOOK_UPS[name](self._context):
                    gauge.add_metric(labels, value)
                yield gauge
            else:
                yield self._family(name, metric, sums[FIRST_COLUMN[name] : FIRST_COLUMN[name] + metric.columns])

    def _family(self, name: str, metric: Metric, sums: NDArray[np.float64]) -> Family:
        family = _FAMILIES[metric.kind](name, metric.help, labels=metric.labels)
        every = itertools.product(*(self._label_values(label) for label in metric.labels))
        for labels, cells in zip(every, sums.reshape(-1, metric.width).tolist(), strict=False):
            if metric.sparse and not any(cells):
                continue
            if isinstance(family, HistogramMetricFamily):
                *counts, total = cells
                bounds = (*map(str, metric.buckets), "+Inf")
                family.add_metric(labels, list(zip(bounds, itertools.accumulate(counts), strict=True)), total)
            else:
                family.add_metric(labels, cells[0])
        return family

    def _label_values(self, label: str) -> tuple[str, ...]:
        """Give the values of a label in the order of their places in the table."""
        if label == "route":
            return self._context.metrics.routes
        if label == "label":
            model = self._context.engine.status().model
            return () if model is None else class_labels(model.class_names)
        return {"status": STATUSES, "reason": REASONS, "outcome": RELOAD_OUTCOMES}[label]


def _queue_images(context: ServiceContext) -> Samples:
    yield (), context.engine.status().queue_depth


def _ready(context: ServiceContext) -> Samples:
    yield (), context.state()[0] == "ready"


def _model_info(context: ServiceContext) -> Samples:
    status = context.engine.status()
    if status.model is not None:
        yield (status.model.name, status.model.version, status.runtime, status.device), 1.0


def _resident_memory(context: ServiceContext) -> Samples:
    """Ask Linux for the memory of every process that has a row; elsewhere there is no answer."""
    values = context.metrics.values
    for row in range(values.rows):
        process_id = values.facts(row).process_id
        if not process_id:
            continue
        try:
            pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
        except OSError:  # it has just ended
            continue
        yield (row_name(row),), float(pages * os.sysconf("SC_PAGE_SIZE"))


def _device_memory(context: ServiceContext) -> Samples:
    engine = context.metrics.values.facts(ENGINE)
    if engine.device_total_bytes:
        yield ("used",), engine.device_used_bytes
        yield ("total",), engine.device_total_bytes


def _device_utilization(context: ServiceContext) -> Samples:
    engine = context.metrics.values.facts(ENGINE)
    if engine.device_total_bytes and not math.isnan(engine.device_utilization):
        yield (), engine.device_utilization


_LOOK_UPS: dict[str, Callable[[ServiceContext], Samples]] = {
    "service_queue_images": _queue_images,
    "service_ready": _ready,
    "service_model_info": _model_info,
    "service_resident_memory_bytes": _resident_memory,
    "service_device_memory_bytes": _device_memory,
    "service_device_utilization_ratio": _device_utilization,
}

_FAMILIES: dict[str, Callable[..., CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
