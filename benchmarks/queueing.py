"""A queueing model of the service: what measured parts let it answer on any number of cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from benchmarks.parts import BATCH_SIZES
from service.engine.batching import Batching


@dataclass(frozen=True)
class Parts:
    """What one upload needs by itself, measured with every core of this machine busy.

    ``decode_s`` and ``http_s`` are seconds of a core; the latter are of a server that only cuts the form, and of its client.
    ``model`` has images per second by batch size, all streams together, on ``cores`` cores or on a device of its own.
    """

    decode_s: float
    http_s: float
    model: dict[int, float]
    model_on_cores: bool
    cores: int

    def stations(self, batch: int, cores: int, rest_s: float = 0.0) -> list[tuple[float, int]]:
        """Return the seconds that a request needs, and how many servers there are for it, for each kind of server."""
        on_core_s, model_s = self.decode_s + self.http_s + rest_s, 1 / self.model[batch]
        if self.model_on_cores:
            return [(on_core_s + model_s * self.cores, cores)]
        return [(on_core_s, cores), (model_s, 1)]

    def allowed_per_s(self) -> float:
        """Requests a second with all servers busy and the largest batches."""
        return min(servers / needed_s for needed_s, servers in self.stations(BATCH_SIZES[-1], self.cores))


def batch_size(connections: int, cores: int) -> int:
    """Return how many of that many waiting requests the service's own policy takes for a batch."""
    policy = Batching(streams=cores, efficient_batch=8, sizes=BATCH_SIZES, lone=False)
    chosen = policy.choose(repeat(1, connections), connections, {})
    assert chosen is not None, "an idle device never waits"
    return max(size for size in BATCH_SIZES if size <= chosen[0])


def predict_rate(stations: Sequence[tuple[float, int]], customers: int) -> float:
    """Requests a second of a closed network, by mean value analysis (Reiser and Lavenberg, 1980).

    A station of m servers, each of which needs D seconds, counts as one of D / m and a delay of D (m - 1) / m (Seidmann, 1987).
    Two servers of 1 s and one customer give 1 a second; many customers give 2.
    """
    waiting = [0.0] * len(stations)
    rate = 0.0
    for customer in range(1, customers + 1):
        stays = [needed_s / servers * (1 + queue) for (needed_s, servers), queue in zip(stations, waiting, strict=True)]
        rate = customer / (sum(stays) + sum(needed_s * (servers - 1) / servers for needed_s, servers in stations))
        waiting = [rate * stay for stay in stays]
    return rate
