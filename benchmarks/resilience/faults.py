"""The faults: each done to a real service under constant load, and what must hold of it.

Owns: what is done, and which losses count. Does not know: how the table looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load.closed_loop import LoadResult, run_wrk
from benchmarks.load.health_watch import HealthWatch, ask_ready
from benchmarks.load.http_connection import HttpConnection, NoAnswer
from benchmarks.load.round_robin_proxy import RoundRobinProxy
from benchmarks.load.steady_load import Sample, SteadyLoad
from benchmarks.load.uploads import http_request
from benchmarks.servers.footprint import peer_ports
from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

_CLIENTS = 16
_PAUSE_S = 0.1  # 160 requests a second from 16 clients
_FULL_LOAD_CLIENTS = 32
_AFTERWARDS = 100  # answers that are waited for once the fault is over


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


@dataclass(frozen=True)
class Fault:
    """``promise`` is what a user may rely on; ``run`` does it and looks."""

    promise: str
    run: Callable[[Ground], Coroutine[Any, Any, Outcome]]


async def kill_engine(ground: Ground) -> Outcome:
    """SIGKILL of the engine process."""
    with ServiceProcess(ground.checkpoint, workers=2) as service:
        return await _break_engine(service, ground, signal.SIGKILL)


async def hang_engine(ground: Ground) -> Outcome:
    """SIGSTOP of the engine process: it is there, its socket is open, and nothing moves."""
    with ServiceProcess(ground.checkpoint, workers=2, device_timeout_s=3) as service:
        return await _break_engine(service, ground, signal.SIGSTOP)


async def _break_engine(service: ServiceProcess, ground: Ground, number: signal.Signals) -> Outcome:
    async with HealthWatch(service.url) as watch:
        async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS, pause_s=_PAUSE_S) as load:
            await load.wait_for_more(_AFTERWARDS)
            began = time.monotonic()
            os.kill(service.engine_pids[-1], number)
            await asyncio.to_thread(service.wait_until_ready, 2)
            await load.wait_for_more(_AFTERWARDS)
        outcome = _judge(load, watch)
    outcome.ready_again = _since(began, watch.ready_again_at)
    if watch.ready_again_at is None:
        outcome.failures.append("readiness never told of the fault")
    workers = sum(len(service.worker_pids(index)) for index in range(2))
    outcome.seen = f"{len(service.engine_pids)} engines and {workers} workers were started in all"
    if workers != 2 or len(service.engine_pids) != 2:
        outcome.failures.append(f"other processes were started again: {outcome.seen}")
    return outcome


async def kill_worker(ground: Ground) -> Outcome:
    """SIGKILL of the busier of two workers; what it had accepted is known from the kernel's table of connections."""
    with ServiceProcess(ground.checkpoint, workers=2) as service:
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS) as load:
                await load.wait_for_more(_AFTERWARDS)
                workers = [service.worker_pids(index)[-1] for index in range(2)]
                victim, survivor = sorted(workers, key=lambda pid: len(peer_ports(pid)), reverse=True)
                os.kill(victim, signal.SIGSTOP)  # so that it accepts no more
                own = peer_ports(victim)
                began = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                await asyncio.to_thread(service.wait_until_ready, 2)
                back = time.monotonic()
                await load.wait_for_more(_AFTERWARDS)
            watch.lost_ports = [port for port in watch.lost_ports if port not in own]
            outcome = _judge(load, watch, own)
        outcome.ready_again = _since(began, back)
        outcome.seen = f"the worker held {len(own)} connections; the other one stayed ready"
        if watch.ready_again_at is not None:
            outcome.failures.append("the other worker was not ready")
        started = [pid for index in range(2) for pid in service.worker_pids(index)]
        if len(service.engine_pids) != 1 or len(started) != 3 or not Path(f"/proc/{survivor}").exists():
            outcome.failures.append("other processes were started again")
    return outcome


async def terminate(ground: Ground) -> Outcome:
    """SIGTERM under full load."""
    with ServiceProcess(ground.checkpoint, workers=2, shutdown_grace_s=1) as service:
        async with SteadyLoad(service.url, ground.samples, clients=_FULL_LOAD_CLIENTS, until_unreachable=True) as load:
            await load.wait_for_more(_AFTERWARDS)
            before = load.answered
            began = time.monotonic()
            status = await asyncio.to_thread(service.stop)
            outcome_at = time.monotonic()
        outcome = _judge(load)
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
            SteadyLoad(proxy.url, ground.samples, clients=_CLIENTS, pause_s=_PAUSE_S) as load,
        ):
            await load.wait_for_more(_AFTERWARDS)
            statuses = []
            for index, service in enumerate(services):
                statuses.append(await asyncio.to_thread(service.stop))
                new = await asyncio.to_thread(stack.enter_context, _instance(ground))
                proxy.instances[index] = new.url
                await load.wait_until(lambda url=new.url: url in proxy.ready)  # type: ignore[misc]  # bound at once
                await load.wait_for_more(_AFTERWARDS)
        outcome = _judge(load)
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
    path = ground.folder / "replaced.safetensors"
    shutil.copyfile(ground.checkpoint, path)
    with ServiceProcess(path, workers=2) as service:
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS) as load:
                await load.wait_for_more(_AFTERWARDS)
                [old] = load.versions
                new = await asyncio.to_thread(_save_variant, load_checkpoint(path), path)
                await asyncio.to_thread(service.wait_for_output, "outcome.*loaded")
                await load.wait_until(lambda: new in load.versions)
                await load.wait_for_more(_AFTERWARDS)
            outcome = _judge(load, watch)
    outcome.seen = f"answers of model {old}, then of {new}"
    if load.versions != {old, new}:
        outcome.failures.append(f"answers of {sorted(load.versions)}")
    _require_no_interruption(outcome, watch)
    return outcome


async def corrupt_checkpoint(ground: Ground) -> Outcome:
    """A checkpoint that lacks its last kilobyte in place of the one that serves."""
    path = ground.folder / "corrupted.safetensors"
    shutil.copyfile(ground.checkpoint, path)
    with ServiceProcess(path, workers=2) as service:
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS) as load:
                await load.wait_for_more(_AFTERWARDS)
                damaged = path.with_suffix(".damaged")
                damaged.write_bytes(path.read_bytes()[:-1000])
                os.replace(damaged, path)
                await asyncio.to_thread(service.wait_for_output, "checkpoint refused")
                await load.wait_for_more(_AFTERWARDS)
            outcome = _judge(load, watch)
        health = await ask_ready(service.url)
    outcome.seen = "one model answered; `/health` says why the file was refused"
    if len(load.versions) != 1:
        outcome.failures.append(f"answers of {sorted(load.versions)}")
    if health is None or b"refused" not in health.body:
        outcome.failures.append("health does not tell of the refusal")
    _require_no_interruption(outcome, watch)
    return outcome


async def overload(ground: Ground) -> Outcome:
    """Three times the requests that it answered before, from more clients than the queue takes; none heeds Retry-After."""
    bound, timeout_s, times, clients = 64, 5.0, 3, 256
    with ServiceProcess(
        ground.checkpoint,
        workers=1,
        max_queue_images=bound,
        max_images_per_request=bound,
        max_batch_size=16,
        request_timeout_s=timeout_s,
    ) as service:
        async with SteadyLoad(service.url, ground.samples, clients=bound // 2) as well:
            usual_per_s = await _answers_per_s(well, 3000)
        async with HealthWatch(service.url) as watch:
            pause_s = clients / (times * usual_per_s)
            async with SteadyLoad(service.url, ground.samples, clients=clients, pause_s=pause_s) as load:
                per_s = await _answers_per_s(load, 10_000)
            outcome = _judge(load, watch)
    _judge_overload(outcome, load, watch, bound=bound, timeout_s=timeout_s, per_s=per_s, usual_per_s=usual_per_s)
    if not load.refused[429]:
        outcome.failures.append("it was never overloaded")
    _require_no_interruption(outcome, watch)
    return outcome


async def overload_tenfold(ground: Ground) -> Outcome:
    """A minute of ten times the connections that keep it busy, none of which pauses, beside a few that do."""
    bound, timeout_s, busy, times, seconds = 64, 5.0, 64, 10, 60
    requests = [http_request("POST", "/predict", sample.image, "image/png") for sample in ground.samples]
    with ServiceProcess(
        ground.checkpoint, workers=1, max_queue_images=bound, max_images_per_request=bound, request_timeout_s=timeout_s
    ) as service:

        async def crowd(connections: int, duration_s: int) -> LoadResult:
            return await asyncio.to_thread(run_wrk, service.url, requests, connections=connections, duration_s=duration_s)

        usual = await crowd(busy, 10)
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS, pause_s=1.0) as load:
                result = await crowd(times * busy, seconds)
            outcome = _judge(load, watch)
    outcome.sent += result.requests + result.broken
    outcome.answered += result.requests - result.refused
    outcome.refused += result.refused
    outcome.lost += result.broken
    per_s = result.requests_per_s * (1 - result.refused / result.requests)
    _judge_overload(outcome, load, watch, bound=bound, timeout_s=timeout_s, per_s=per_s, usual_per_s=usual.requests_per_s)
    if result.broken:
        outcome.failures.append(f"{result.broken} of the crowd's requests got no answer")
    if not result.refused:
        outcome.failures.append("it was never overloaded")
    _require_no_interruption(outcome, watch)
    return outcome


def _judge_overload(
    outcome: Outcome, load: SteadyLoad, watch: HealthWatch, *, bound: int, timeout_s: float, per_s: float, usual_per_s: float
) -> None:
    """Say what an overload did to rate, queue and waiting, and fail one that let more wait, or longer, than it may."""
    outcome.seen = (
        f"{per_s:.0f} answered a second, {usual_per_s:.0f} before; queue at most {watch.deepest_queue} of {bound};"
        f" slowest answer {load.slowest_answer_s:.2f} s, slowest `/health` {watch.slowest_s:.2f} s"
    )
    if watch.deepest_queue > bound:
        outcome.failures.append(f"{watch.deepest_queue} images waited")
    if load.slowest_answer_s > timeout_s + 1:
        outcome.failures.append(f"an answer took {load.slowest_answer_s:.1f} s")
    if watch.slowest_s > timeout_s:
        outcome.failures.append("a health probe over a new connection waited longer than any request may")


async def _answers_per_s(load: SteadyLoad, requests: int) -> float:
    sent, answered, began = load.sent, load.answered, time.monotonic()
    await load.wait_until(lambda: load.sent - sent >= requests)
    return (load.answered - answered) / (time.monotonic() - began)


async def leave_in_the_middle(ground: Ground) -> Outcome:
    """Clients that send half a request or a whole one, and leave with a reset, beside the steady ones."""
    left = 0

    async def leave(url: str, request: bytes, stopping: asyncio.Event) -> None:
        nonlocal left
        while not stopping.is_set():
            connection = await HttpConnection.open(url)
            connection.send(request[: len(request) // 2 if left % 2 else None])
            await asyncio.sleep(0.005 * (left % 5))
            connection.abort()
            left += 1

    with ServiceProcess(ground.checkpoint, workers=2) as service:
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS, pause_s=_PAUSE_S) as load:
                stopping = asyncio.Event()
                request = http_request("POST", "/predict", ground.samples[0].image, "image/png")
                leavers = [asyncio.create_task(leave(service.url, request, stopping)) for _ in range(8)]
                await load.wait_until(lambda: left >= 2000)
                stopping.set()
                await asyncio.gather(*leavers)
                await load.wait_for_more(_AFTERWARDS)
            outcome = _judge(load, watch)
        outcome.seen = f"{left} clients left, every other one within its request"
        if len(service.engine_pids) != 1 or "ERROR" in service.output:
            outcome.failures.append("it was an error to the service")
    _require_no_interruption(outcome, watch)
    return outcome


async def slow_clients(ground: Ground) -> Outcome:
    """Clients that send a byte every tenth of a second, half of them within the headers, beside the steady ones."""
    count, refused = 200, 0

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

    with ServiceProcess(ground.checkpoint, workers=2, header_timeout_s=2, body_timeout_s=2) as service:
        async with HealthWatch(service.url) as watch:
            async with SteadyLoad(service.url, ground.samples, clients=_CLIENTS, pause_s=_PAUSE_S) as load:
                heads = (
                    b"POST /predict HTTP/1.1\r\nhost: chaos\r\nx-slow: ",
                    b"POST /predict HTTP/1.1\r\nhost: chaos\r\ncontent-type: image/png\r\ncontent-length: 100000\r\n\r\n",
                )
                async with asyncio.timeout(60):
                    await asyncio.gather(*(dribble(service.url, heads[index % 2]) for index in range(count)))
                await load.wait_for_more(_AFTERWARDS)
            outcome = _judge(load, watch)
    outcome.seen = f"{count} slow clients were all cut off, {refused} of them read their 408"
    _require_no_interruption(outcome, watch)
    return outcome


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
    "Overload, three times (a queue of 64)": Fault(
        "The queue's bound holds, what is beyond it gets 429 with `Retry-After`, nobody waits past the deadline, and"
        " `/health` answers all along.",
        overload,
    ),
    "Overload, tenfold for a minute (a queue of 64)": Fault(
        "The same with ten times the connections that keep it busy, none of which pauses or heeds `Retry-After`.",
        overload_tenfold,
    ),
    "Clients that leave": Fault("They harm nobody else.", leave_in_the_middle),
    "Slow clients (slowloris)": Fault(
        "They are cut off after `header_timeout_s` and `body_timeout_s` (here 2 s), and nobody else waits for them.",
        slow_clients,
    ),
}


def _judge(load: SteadyLoad, watch: HealthWatch | None = None, own: set[int] | None = None) -> Outcome:
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
            outcome.failures.append(f"{len(watch.lost_ports)} of {watch.probes} health probes were not answered")
    return outcome


def _require_no_interruption(outcome: Outcome, watch: HealthWatch) -> None:
    if watch.ready_again_at is not None:
        outcome.ready_again = "left ready"
        outcome.failures.append("it was not ready in between")


def _since(began: float, at: float | None) -> str:
    return "-" if at is None else f"{at - began:.1f} s"


def _save_variant(checkpoint: Checkpoint, path: Path) -> str:
    """Save the same network with a slightly other temperature in place of ``path``; give its version."""
    calibration = checkpoint.metadata.calibration
    warmer = calibration.model_copy(update={"temperature": calibration.temperature * 1.02})
    metadata = checkpoint.metadata.model_copy(update={"calibration": warmer})
    weights = {name: value.astype("float32") for name, value in checkpoint.weights.items()}
    return save_checkpoint(path, weights, metadata, canary=checkpoint.canary)[:12]
