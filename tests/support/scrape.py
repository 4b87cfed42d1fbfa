"""What ``/metrics`` says, read by prometheus_client's own parser."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang


@dataclass(frozen=True)
class Scrape:
    """One answer of ``/metrics``."""

    families: dict[str, Metric]

    def value(self, name: str, /, **labels: str) -> float:
        """Give the sum of the samples of this name that have these labels, 0 where there is none."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def series(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Give the samples of this name by the values of these labels."""
        return {
            tuple(sample.labels[label] for label in labels): sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name
        }


def parse(text: str) -> Scrape:
    """Read the text format."""
    return Scrape({family.name: family for family in text_string_to_metric_families(text)})


def scrape(url: str) -> Scrape:
    """Fetch ``url``/metrics over a connection of its own, so that any worker may answer."""
    response = httpx.get(f"{url}/metrics")
    assert response.status_code == 200, response.text
    return parse(response.text)


def scrape_until(url: str, condition: Callable[[Scrape], bool]) -> Scrape:
    """Fetch again and again until ``condition`` holds; raise AssertionError after a minute."""
    limit = time.monotonic() + _PATIENCE_S
    while not condition(seen := scrape(url)):
        assert time.monotonic() < limit, f"it never came true of {seen}"
    return seen
