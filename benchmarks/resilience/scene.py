"""The scene of a fault: a real service under steady load and watched, and the count of what became of every request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load.health_watch import HealthWatch
from benchmarks.load.steady_load import Sample, SteadyLoad
from benchmarks.servers.service_process import ServiceProcess

CLIENTS = 16
PAUSE_S = 0.1  # 160 requests a second from 16 clients
MORE = 100  # responses to wait for before the fault and after it


@dataclass(frozen=True)
class Ground:
    """What a fault works with: a checkpoint, images with the labels that it gives them, and a folder of its own."""

    checkpoint: Path
    samples: list[Sample]
    folder: Path


@dataclass
class Outcome:
    """What became of the requests; ``failures`` say which part of the promise was broken."""

    sent: int
    answered: int
    refused: int
    lost: int
    own_connections: int = 0
    ready_again: str = "stayed ready"
    seen: str = ""
    failures: list[str] = field(default_factory=list)


Run = Callable[[Ground], Coroutine[Any, Any, Outcome]]
FAULTS: dict[str, Run] = {}


def fault(name: str) -> Callable[[Run], Run]:
    """Add a function that does a fault and checks its promise, which is the function's docstring, to ``FAULTS``."""
    return lambda run: FAULTS.setdefault(name, run)


@dataclass
class Scene:
    """A service under steady load and watched; ``outcome`` is there once the load has ended.

    ``engines`` and ``workers`` are how many must have been started by then, ``own_ports`` the clients' ports of connections
    that the fault may cut.
    """

    service: ServiceProcess
    watch: HealthWatch
    load: SteadyLoad
    own_ports: set[int] = field(default_factory=set)
    engines: int = 1
    workers: int = 2
    broken_at: float = 0.0
    outcome: Outcome = field(init=False)

    def require(self, holds: bool, otherwise: str) -> None:
        """Record a broken promise unless ``holds``."""
        if not holds:
            self.outcome.failures.append(otherwise)

    async def says(self, pattern: str, times: int = 1) -> None:
        """Wait until ``pattern`` has been in that many lines of the service's output."""
        await asyncio.to_thread(self.service.wait_for_output, pattern, times)

    def started(self) -> tuple[int, int]:
        """How many engines and workers were started in all."""
        return len(self.service.engine_pids), sum(len(self.service.worker_pids(index)) for index in range(2))


@asynccontextmanager
async def open_scene(
    ground: Ground,
    *,
    pause_s: float = PAUSE_S,
    stays_ready: bool = True,
    **settings: Any,
) -> AsyncIterator[Scene]:
    """Start a service and the load on it; the block does the fault; then the load ends, and its outcome is judged.

    Whatever the fault, no process may be started again that it did not hit, nothing may be an error of the service's own, and
    SIGTERM must end the service with status 0.
    """
    settings = {"checkpoint": ground.checkpoint, "workers": 2, **settings}
    with ServiceProcess(**settings) as service:
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=CLIENTS, pause_s=pause_s) as load:
                scene = Scene(service, watch, load, workers=settings["workers"])
                await load.wait_for_more(MORE)
                yield scene
                await load.wait_for_more(MORE)
            watch.lost_ports = [port for port in watch.lost_ports if port not in scene.own_ports]
            scene.outcome = judge(load, watch, scene.own_ports)
            back = watch.ready_again_at
            if back is not None:
                scene.outcome.ready_again = f"{back - scene.broken_at:.1f} s" if scene.broken_at else "left ready"
            scene.require(stays_ready == (back is None), "readiness was not reported as it was")
        status = await asyncio.to_thread(service.stop)
        scene.require(status == 0, f"SIGTERM ended it with status {status}")
        scene.require(scene.started() == (scene.engines, scene.workers), f"engines and workers started: {scene.started()}")
        scene.require("Traceback" not in service.output, "there is a traceback in the log")


def judge(load: SteadyLoad, watch: HealthWatch | None = None, own: set[int] | None = None) -> Outcome:
    """Count; a loss on a connection in ``own`` is expected, a client that finds nobody listening only without ``watch``."""
    lost = [loss for loss in load.lost if loss.port not in (own or set())]
    outcome = Outcome(load.sent, load.answered, load.refused.total(), len(lost), len(load.lost) - len(lost))
    if lost:
        outcome.failures.append(f"{len(lost)} lost, the first: {lost[0].reason}")
    if load.sent != load.answered + load.refused.total() + len(load.lost):
        outcome.failures.append("the counts do not add up")
    if watch is not None:
        if load.unreachable or watch.unreachable:
            outcome.failures.append("nobody accepted a connection")
        if watch.lost_ports:
            outcome.failures.append(f"{len(watch.lost_ports)} health probes were not answered")
    return outcome
