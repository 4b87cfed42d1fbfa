"""The metrics as text for Prometheus, written by prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from service.observability.metrics import METRICS, Snapshot


def exposition(now: Snapshot, accept: str, made: dict[str, bytes]) -> tuple[bytes, str]:
    """Return all metrics in the format that an Accept header asks for, from ``made`` or kept there, and its Content-Type."""
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # the library compares what the client calls a version with numbers
        encode, content_type = choose_encoder("")
    if content_type not in made:
        made[content_type] = encode(_Families(now))
    return made[content_type], content_type


@dataclass
class _Families(Collector):
    now: Snapshot

    def collect(self) -> Iterator[Family]:
        for metric in METRICS.values():
            names, labels, samples = (metric.name, metric.help), list(metric.labels), metric.samples(self.now)
            if metric.buckets:
                histogram = HistogramMetricFamily(*names, labels=labels)
                bounds = (*map(str, metric.buckets), "+Inf")
                for values, (*counts, total) in samples:
                    histogram.add_metric(values, list(zip(bounds, accumulate(counts), strict=True)), total)
                yield histogram
            else:
                family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(*names, labels=labels)
                for values, (value,) in samples:
                    family.add_metric(values, value)
                yield family
