"""The metrics as text for Prometheus, written by prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.exposition import choose_encoder
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
    family = Family(metric.name.removesuffix("_total"), metric.help, metric.kind)
    bounds = (*map(str, metric.buckets), "+Inf")
    for values, cells in metric.samples(now):
        labels = dict(zip(metric.labels, values, strict=True))
        if metric.buckets:
            counts = list(accumulate(cells[:-1]))
            for bound, count in zip(bounds, counts, strict=True):
                family.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{metric.name}_count", labels, counts[-1])
            family.add_sample(f"{metric.name}_sum", labels, cells[-1])
        else:
            family.add_sample(metric.name, labels, cells[0])
    return family
