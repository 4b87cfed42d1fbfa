"""The faults: each done to a real service under constant load, and what must hold of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load.closed_loop import LoadResult, run_wrk
from benchmarks.load.health_watch import ask_ready
from benchmarks.load.http_connection import HttpConnection, NoAnswer
from benchmarks.load.round_robin_proxy import RoundRobinProxy
from benchmarks.load.steady_load import SteadyLoad
from benchmarks.load.uploads import http_request
from benchmarks.resilience.scene import CLIENTS, MORE, PAUSE_S, Ground, Outcome, judge, open_scene
from benchmarks.servers.footprint import peer_ports
from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

_FULL_LOAD_CLIENTS = 32


@dataclass(frozen=True)
class Fault:
    """``promise`` is what a user may rely on; ``run`` does the fault and checks the promise."""

    promise: str
    run: Callable[[Ground], Coroutine[Any, Any, Outcome]]


async def kill_engine(ground: Ground) -> Outcome:
    """SIGKILL of the engine process."""
    return await _break_engine(ground, signal.SIGKILL)


async def hang_engine(ground: Ground) -> Outcome:
    """SIGSTOP of the engine process: it is there, its socket is open, and nothing moves."""
    return await _break_engine(ground, signal.SIGSTOP, device_timeout_s=3)


async def _break_engine(ground: Ground, number: signal.Signals, **settings: Any) -> Outcome:
    async with open_scene(ground, stays_ready=False, **settings) as scene:
        began = time.monotonic()
        os.kill(scene.service.engine_pids[-1], number)
        await asyncio.to_thread(scene.service.wait_until_ready, 2)
    back = scene.watch.ready_again_at
    scene.outcome.ready_again = "-" if back is None else f"{back - began:.1f} s"
    scene.require(back is not None, "readiness never reported the fault")
    engines, workers = len(scene.service.engine_pids), sum(len(scene.service.worker_pids(index)) for index in range(2))
    scene.outcome.seen = f"{engines} engines and {workers} workers were started in all"
    scene.require((engines, workers) == (2, 2), f"other processes were started again: {scene.outcome.seen}")
    return scene.outcome


async def kill_worker(ground: Ground) -> Outcome:
    """SIGKILL of the busier of two workers; what it had accepted is known from the kernel's table of connections."""
    async with open_scene(ground, pause_s=0) as scene:
        workers = [scene.service.worker_pids(index)[-1] for index in range(2)]
        victim, survivor = sorted(workers, key=lambda pid: len(peer_ports(pid)), reverse=True)
        os.kill(victim, signal.SIGSTOP)  # so that it accepts no more
        scene.own_ports |= peer_ports(victim)
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        await asyncio.to_thread(scene.service.wait_until_ready, 2)
        back = time.monotonic()
        survived = Path(f"/proc/{survivor}").exists()
    if scene.watch.ready_again_at is None:
        scene.outcome.ready_again = f"{back - began:.1f} s"
    scene.outcome.seen = f"the worker held {len(scene.own_ports)} connections; the other one stayed ready"
    started = sum(len(scene.service.worker_pids(index)) for index in range(2))
    scene.require(survived and len(scene.service.engine_pids) == 1 and started == 3, "other processes were started again")
    return scene.outcome


async def terminate(ground: Ground) -> Outcome:
    """SIGTERM under full load."""
    with ServiceProcess(ground.checkpoint, workers=2, shutdown_grace_s=1) as service:
        async with SteadyLoad(service.url, ground.samples, clients=_FULL_LOAD_CLIENTS, until_unreachable=True) as load:
            await load.wait_for_more(MORE)
            before = load.answered
            began = time.monotonic()
            status = await asyncio.to_thread(service.stop)
            outcome_at = time.monotonic()
        outcome = judge(load)
        outcome.ready_again = "-"
        outcome.seen = f"{load.answered - before} answered after the signal; exit {status} after {outcome_at - began:.1f} s"
        if status != 0:
            outcome.failures.append(f"exit status {status}")
    return outcome


async def restart_rolling(ground: Ground) -> Outcome:
    """Two instances behind a proxy, stopped and started one after the other; zero failed, refusals included."""
    with ExitStack() as stack:
        services = [stack.enter_context(_instance(ground)) for _ in range(2)]
        async with (
            RoundRobinProxy([service.url for service in services]) as proxy,
            SteadyLoad(proxy.url, ground.samples, clients=CLIENTS, pause_s=PAUSE_S) as load,
        ):
            await load.wait_for_more(MORE)
            statuses = []
            for index, service in enumerate(services):
                statuses.append(await asyncio.to_thread(service.stop))
                new = await asyncio.to_thread(stack.enter_context, _instance(ground))
                proxy.instances[index] = new.url
                await load.wait_until(lambda url=new.url: url in proxy.ready)  # type: ignore[misc]  # bound at once
                await load.wait_for_more(MORE)
        outcome = judge(load)
    outcome.seen = "both instances were replaced"
    if statuses != [0, 0]:
        outcome.failures.append(f"exit statuses {statuses}")
    if outcome.refused:
        outcome.failures.append("requests were refused")
    return outcome


def _instance(ground: Ground) -> ServiceProcess:
    return ServiceProcess(ground.checkpoint, workers=1, shutdown_grace_s=1)


async def replace_checkpoint(ground: Ground) -> Outcome:
    """A new good checkpoint in place of the one that serves."""
    path = Path(shutil.copyfile(ground.checkpoint, ground.folder / "replaced.safetensors"))
    async with open_scene(ground, checkpoint=path, pause_s=0) as scene:
        [old] = scene.load.versions
        new = await asyncio.to_thread(_save_variant, load_checkpoint(path), path)
        await asyncio.to_thread(scene.service.wait_for_output, "outcome.*loaded")
        await scene.load.wait_until(lambda: new in scene.load.versions)
    scene.outcome.seen = f"responses of model {old}, then of {new}"
    scene.require(scene.load.versions == {old, new}, f"responses of {sorted(scene.load.versions)}")
    return scene.outcome


async def corrupt_checkpoint(ground: Ground) -> Outcome:
    """A checkpoint that lacks its last kilobyte in place of the one that serves."""
    path = Path(shutil.copyfile(ground.checkpoint, ground.folder / "corrupted.safetensors"))
    async with open_scene(ground, checkpoint=path, pause_s=0) as scene:
        damaged = path.with_suffix(".damaged")
        damaged.write_bytes(path.read_bytes()[:-1000])
        os.replace(damaged, path)
        await asyncio.to_thread(scene.service.wait_for_output, "checkpoint refused")
        health = await ask_ready(scene.service.url)
    scene.outcome.seen = "one model answered; `/health` says why the file was refused"
    scene.require(len(scene.load.versions) == 1, f"responses of {sorted(scene.load.versions)}")
    scene.require(health is not None and b"refused" in health.body, "health does not report the refusal")
    return scene.outcome


async def overload(ground: Ground) -> Outcome:
    """A minute of ten times the connections that keep it busy, none of which pauses, while a few others do."""
    bound, timeout_s, busy, times, seconds = 64, 5.0, 64, 10, 60
    requests = [http_request("POST", "/predict", sample.image, "image/png") for sample in ground.samples]
    limits: dict[str, Any] = {"max_queue_images": bound, "max_images_per_request": bound, "request_timeout_s": timeout_s}
    async with open_scene(ground, workers=1, pause_s=1.0, **limits) as scene:

        async def crowd(connections: int, duration_s: int) -> LoadResult:
            url = scene.service.url
            return await asyncio.to_thread(run_wrk, url, requests, connections=connections, duration_s=duration_s)

        usual = await crowd(busy, 10)
        result = await crowd(times * busy, seconds)
    outcome, watch, slowest_s = scene.outcome, scene.watch, scene.load.slowest_answer_s
    for phase in (usual, result):
        outcome.sent += phase.requests + phase.broken
        outcome.answered += phase.requests - phase.refused
        outcome.refused += phase.refused
        outcome.lost += phase.broken
    outcome.seen = (
        f"{result.requests_per_s * (1 - result.refused / result.requests):.0f} answered a second,"
        f" {usual.requests_per_s:.0f} before; queue at most {watch.deepest_queue} of {bound};"
        f" slowest response {slowest_s:.2f} s, slowest `/health` {watch.slowest_s:.2f} s"
    )
    scene.require(watch.deepest_queue <= bound, f"{watch.deepest_queue} images waited")
    scene.require(slowest_s <= timeout_s + 1, f"a response took {slowest_s:.1f} s")
    scene.require(watch.slowest_s <= timeout_s, "a health probe over a new connection waited longer than any request may")
    scene.require(not (usual.broken or result.broken), "some of the crowd's requests got no response")
    scene.require(result.refused > 0, "it was never overloaded")
    return outcome


async def leave_in_the_middle(ground: Ground) -> Outcome:
    """Clients that send half a request or a whole one, and leave with a reset, while the steady ones go on."""
    left = 0
    request = http_request("POST", "/predict", ground.samples[0].image, "image/png")

    async def leave(url: str) -> None:
        nonlocal left
        while left < 2000:
            connection = await HttpConnection.open(url)
            connection.send(request[: len(request) // 2 if left % 2 else None])
            await asyncio.sleep(0.005 * (left % 5))
            connection.abort()
            left += 1

    async with open_scene(ground) as scene, asyncio.timeout(120):
        await asyncio.gather(*(leave(scene.service.url) for _ in range(8)))
    scene.outcome.seen = f"{left} clients left, every other one within its request"
    scene.require(len(scene.service.engine_pids) == 1 and "ERROR" not in scene.service.output, "it was an error to the service")
    return scene.outcome


async def slow_clients(ground: Ground) -> Outcome:
    """Clients that send a byte every tenth of a second, half of them within the headers, while the steady ones go on."""
    count, refused = 200, 0
    heads = (
        b"POST /predict HTTP/1.1\r\nhost: chaos\r\nx-slow: ",
        b"POST /predict HTTP/1.1\r\nhost: chaos\r\ncontent-type: image/png\r\ncontent-length: 100000\r\n\r\n",
    )

    async def dribble(url: str, head: bytes) -> None:
        nonlocal refused
        connection = await HttpConnection.open(url)
        connection.send(head)
        answer = asyncio.create_task(connection.answer(patience_s=30))
        while not answer.done():
            connection.send(b"a")
            await asyncio.wait([answer], timeout=0.1)
        with contextlib.suppress(NoAnswer):
            refused += answer.result().status == 408
        await connection.close()

    async with open_scene(ground, header_timeout_s=2, body_timeout_s=2) as scene, asyncio.timeout(60):
        await asyncio.gather(*(dribble(scene.service.url, heads[index % 2]) for index in range(count)))
    scene.outcome.seen = f"{count} slow clients were all cut off, {refused} of them read their 408"
    return scene.outcome


FAULTS = {
    "SIGKILL of the engine": Fault(
        "What waited is refused with 503 at once, no worker restarts, and the engine comes back by itself.", kill_engine
    ),
    "SIGSTOP of the engine (a hang)": Fault(
        "An engine that gives no sign of life is not ready, is killed after `device_timeout_s` (here 3 s) and replaced;"
        " what waited is refused.",
        hang_engine,
    ),
    "SIGKILL of a worker": Fault(
        "Only requests on connections that this worker had accepted are lost, the others stay ready, and it is started again.",
        kill_worker,
    ),
    "SIGTERM under full load": Fault(
        "Every accepted request is answered, nobody sees a reset, and the exit status is 0.", terminate
    ),
    "Rolling restart of two instances": Fault(
        "Behind a proxy that honours `/health/ready` and retries nothing, no request fails or is refused.", restart_rolling
    ),
    "A new checkpoint": Fault(
        "It takes over between two batches: no request fails, and every answer names the model that made it.",
        replace_checkpoint,
    ),
    "A corrupt checkpoint": Fault("It changes nothing, and `/health` says why.", corrupt_checkpoint),
    "Overload, tenfold for a minute (a queue of 64)": Fault(
        "With ten times the connections that keep it busy, none of which heeds `Retry-After`, the queue's bound holds, what is"
        " beyond it gets 429, nobody waits past the deadline, and `/health` responds all along.",
        overload,
    ),
    "Clients that leave": Fault("They harm nobody else.", leave_in_the_middle),
    "Slow clients (slowloris)": Fault(
        "They are cut off after `header_timeout_s` and `body_timeout_s` (here 2 s), and nobody else waits for them.",
        slow_clients,
    ),
}


def _save_variant(checkpoint: Checkpoint, path: Path) -> str:
    """Save the same network with a slightly other temperature in place of ``path``; return its version."""
    calibration = checkpoint.metadata.calibration
    warmer = calibration.model_copy(update={"temperature": calibration.temperature * 1.02})
    metadata = checkpoint.metadata.model_copy(update={"calibration": warmer})
    weights = {name: value.astype("float32") for name, value in checkpoint.weights.items()}
    return save_checkpoint(path, weights, metadata, canary=checkpoint.canary, typicality=checkpoint.typicality)[:12]
