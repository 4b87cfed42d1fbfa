"""The queueing model against results that are known exactly."""

from __future__ import annotations

import pytest

from benchmarks.queueing import Parts, batch_size, predict_rate


@pytest.mark.parametrize(
    ("stations", "customers", "rate"),
    [
        ([(0.5, 1)], 1, 2.0),
        ([(0.5, 1)], 100, 2.0),
        ([(1.0, 4)], 1, 1.0),
        ([(1.0, 1), (1.0, 1)], 2, 2 / 3),  # each finds the other at the same station with probability 1/2
    ],
)
def test_rates_that_are_known(stations: list[tuple[float, int]], customers: int, rate: float) -> None:
    """One server is busy all the time, one customer never waits, and two equal stations share two customers."""
    assert predict_rate(stations, customers) == pytest.approx(rate)


def test_many_customers_keep_the_slowest_station_busy() -> None:
    """Four servers of a second each answer four a second."""
    assert predict_rate([(1.0, 4), (0.01, 1)], 500) == pytest.approx(4.0, rel=0.01)


def test_parts_on_cores_add_up_and_a_device_works_concurrently() -> None:
    """Two cores that need 1 ms for HTTP and 1 ms for the model allow 1,000 a second, and 2,000 beside a device."""
    on_cores = Parts(0.0005, 0.0005, {64: 2000.0}, model_on_cores=True, cores=2)
    assert on_cores.allowed_per_s() == pytest.approx(1000)
    assert Parts(0.0005, 0.0005, {64: 2500.0}, model_on_cores=False, cores=2).allowed_per_s() == pytest.approx(2000)


def test_batches_are_those_of_the_policy() -> None:
    """A share for each stream and one for HTTP, of a size that was measured."""
    assert [batch_size(connections, cores=2) for connections in (1, 16, 64, 256)] == [1, 8, 16, 64]
