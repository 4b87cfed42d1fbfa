"""The metrics as text for Prometheus, written by prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from service.observability.metrics import METRICS, Metric, Snapshot


def exposition(now: Snapshot, accept: str) -> tuple[bytes, str]:
    """Return all metrics in the format that an Accept header asks for, and its Content-Type."""
    try:
        encode, content_type = choose_encoder(accept)
        return encode(_Families(now)), content_type
    except TypeError:  # the library compares what the client calls a version with numbers
        return exposition(now, "")


@dataclass
class _Families(Collector):
    now: Snapshot

    def collect(self) -> Iterator[Family]:
        return (_family(metric, self.now) for metric in METRICS.values())


def _family(metric: Metric, now: Snapshot) -> Family:
    names = (metric.name, metric.help)
    if metric.buckets:
        histogram = HistogramMetricFamily(*names, labels=list(metric.labels))
        bounds = (*map(str, metric.buckets), "+Inf")
        for values, (*counts, total) in metric.samples(now):
            histogram.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), total)
        return histogram
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(*names, labels=list(metric.labels))
    for values, (value,) in metric.samples(now):
        family.add_metric(values, value)
    return family
