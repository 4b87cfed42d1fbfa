"""What happens to the processes, the model and the surroundings of a real service; each docstring is what is promised."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.load.health_watch import ask_ready
from benchmarks.load.round_robin_proxy import RoundRobinProxy
from benchmarks.load.steady_load import SteadyLoad
from benchmarks.resilience.scene import CLIENTS, MORE, PAUSE_S, Ground, Outcome, Scene, fault, judge, open_scene
from benchmarks.servers.footprint import group_resident_mb, peer_ports
from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import load_checkpoint, save_checkpoint

_FULL_LOAD_CLIENTS = 32


@fault("SIGKILL of the engine")
async def kill_engine(ground: Ground) -> Outcome:
    """What waited is refused with 503 at once, no worker restarts, and the engine comes back by itself."""
    async with open_scene(ground, stays_ready=False) as scene:
        await _break_engine(scene, signal.SIGKILL)
    return scene.outcome


@fault("SIGSTOP of the engine (a hang)")
async def hang_engine(ground: Ground) -> Outcome:
    """It is not ready, is killed after `device_timeout_s` (here 3 s) and replaced; what waited is refused."""
    async with open_scene(ground, stays_ready=False, device_timeout_s=3) as scene:
        await _break_engine(scene, signal.SIGSTOP)
    return scene.outcome


@fault("SIGKILL of each engine right after it is ready")
async def kill_each_engine(ground: Ground) -> Outcome:
    """The third is started half a second after the second's death, and the log counts the deaths: it is no restart loop."""
    async with open_scene(ground, stays_ready=False) as scene:
        for deaths in range(1, 4):
            await _break_engine(scene, signal.SIGKILL)
            await scene.says(f"engine died.*deaths_in_a_row={deaths} ")
    scene.outcome.seen = "three deaths in a row were told, and a fourth engine serves"
    return scene.outcome


async def _break_engine(scene: Scene, number: signal.Signals) -> None:
    """Return once the next one has answered."""
    refused, scene.broken_at = scene.load.refused.total(), time.monotonic()
    scene.engines += 1
    os.kill(scene.service.engine_pid, number)
    await scene.load.wait_until(lambda: scene.load.refused.total() > refused)
    await scene.load.wait_for_more(2 * CLIENTS)  # more than were on their way


async def _health_says(scene: Scene, what: bytes) -> None:
    async with asyncio.timeout(10):
        while what not in getattr(await ask_ready(scene.service.url), "body", b""):
            await asyncio.sleep(0.1)


@fault("SIGKILL of a worker")
async def kill_worker(ground: Ground) -> Outcome:
    """Only requests on connections that it had accepted are lost, the others stay ready, and it is started again."""
    return await _break_worker(ground, signal.SIGKILL)


@fault("SIGSTOP of a worker (a hang)")
async def hang_worker(ground: Ground) -> Outcome:
    """It is killed after `device_timeout_s` (here 3 s) and replaced; requests on its own connections are lost."""
    return await _break_worker(ground, signal.SIGSTOP, device_timeout_s=3)


async def _break_worker(ground: Ground, number: signal.Signals, **settings: Any) -> Outcome:
    """Hit the busier of two workers; what it had accepted is known from the kernel's table of connections."""
    async with open_scene(ground, pause_s=0, **settings) as scene:
        workers = [scene.service.worker_pids(index)[-1] for index in range(2)]
        victim = max(workers, key=lambda pid: len(peer_ports(pid)))
        os.kill(victim, signal.SIGSTOP)  # so that it accepts no more
        scene.own_ports |= peer_ports(victim)
        began = time.monotonic()
        os.kill(victim, number)
        scene.workers += 1
        await scene.says("ready on", 2)
        back_s = time.monotonic() - began
    scene.outcome.seen = f"the worker held {len(scene.own_ports)} connections and was replaced after {back_s:.1f} s"
    return scene.outcome


@fault("SIGTERM under full load")
async def terminate(ground: Ground) -> Outcome:
    """Every accepted request is answered, nobody sees a reset, and the exit status is 0."""
    return await _terminate(ground, lambda service: service.send_signal(signal.SIGTERM))


@fault("SIGTERM to the whole group")
async def terminate_group(ground: Ground) -> Outcome:
    """The same, as systemd and `make` send it."""
    return await _terminate(ground, lambda service: os.killpg(service.pid, signal.SIGTERM))


async def _terminate(ground: Ground, signal_it: Any) -> Outcome:
    with ServiceProcess(ground.checkpoint, workers=2, shutdown_grace_s=1) as service:
        async with SteadyLoad(service.url, ground.samples, clients=_FULL_LOAD_CLIENTS, until_unreachable=True) as load:
            await load.wait_for_more(MORE)
            before, began = load.answered, time.monotonic()
            signal_it(service)
            status = await asyncio.to_thread(service.wait)
            took_s = time.monotonic() - began
    outcome = judge(load)
    outcome.ready_again = "-"
    outcome.seen = f"{load.answered - before} answered after the signal; exit {status} after {took_s:.1f} s"
    if status != 0:
        outcome.failures.append(f"exit status {status}")
    return outcome


@fault("Rolling restart of two instances")
async def restart_rolling(ground: Ground) -> Outcome:
    """Behind a proxy that honours `/health/ready` and retries nothing, no request fails or is refused."""
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
    if statuses != [0, 0] or outcome.refused:
        outcome.failures.append(f"exit statuses {statuses}, {outcome.refused} refused")
    return outcome


def _instance(ground: Ground) -> ServiceProcess:
    return ServiceProcess(ground.checkpoint, workers=1, shutdown_grace_s=1)


@fault("A new checkpoint")
async def replace_checkpoint(ground: Ground) -> Outcome:
    """It takes over between two batches: no request fails, and every answer names the model that made it."""
    path = _copy(ground)
    async with open_scene(ground, checkpoint=path, pause_s=0) as scene:
        [old] = scene.load.versions
        new = await _take_over(scene, path)
    scene.outcome.seen = f"responses of model {old}, then of {new}"
    scene.require(scene.load.versions == {old, new}, f"responses of {sorted(scene.load.versions)}")
    return scene.outcome


@fault("Ten new checkpoints, one after the other")
async def replace_ten_times(ground: Ground) -> Outcome:
    """The service does not grow: what a reload took is given back."""
    path = _copy(ground)
    async with open_scene(ground, checkpoint=path) as scene:
        sizes_mb = []
        for _ in range(10):
            await _take_over(scene, path)
            sizes_mb.append(group_resident_mb(scene.service.pid))
    scene.outcome.seen = f"memory after each: {', '.join(f'{size_mb:.0f}' for size_mb in sizes_mb)} MB"
    scene.require(sizes_mb[-1] < 1.1 * min(sizes_mb[:3]), "memory grew from reload to reload")
    return scene.outcome


@fault("A corrupt checkpoint, then SIGKILL of the engine")
async def corrupt_checkpoint(ground: Ground) -> Outcome:
    """It changes nothing, `/health` says why, and the engine that is started again serves what was accepted."""
    path = _copy(ground)
    async with open_scene(ground, checkpoint=path, stays_ready=False) as scene:
        await _replace(scene, path, path.read_bytes()[:-1000], "model refused")
        await _health_says(scene, b"refused")
        await _break_engine(scene, signal.SIGKILL)
    scene.outcome.seen = "one model answered; `/health` says why the file was refused"
    scene.require(len(scene.load.versions) == 1, f"responses of {sorted(scene.load.versions)}")
    return scene.outcome


@fault("No checkpoint at all, then a good one")
async def follow_on(ground: Ground) -> Outcome:
    """Whatever is wrong with the file, following goes on: the next good one is taken."""
    path = _copy(ground)
    async with open_scene(ground, checkpoint=path) as scene:
        await _replace(scene, path, b"", "model refused")
        path.unlink()
        path.mkdir()
        await asyncio.sleep(2)  # it is looked at every second
        path.rmdir()
        shutil.copyfile(ground.checkpoint, path)
        new = await _take_over(scene, path)
    scene.outcome.seen = "an empty file, then a folder, then a model"
    scene.require(new in scene.load.versions, f"responses of {sorted(scene.load.versions)}")
    return scene.outcome


@fault("A rollback, a touch of the file, SIGKILL of the engine")
async def roll_back(ground: Ground) -> Outcome:
    """What was rolled back does not come back by itself."""
    path = _copy(ground)
    async with open_scene(ground, checkpoint=path, stays_ready=False) as scene:
        [old] = scene.load.versions
        await _take_over(scene, path)
        scene.service.send_signal(signal.SIGUSR1)
        await scene.says("outcome.*rolled_back")
        path.touch()
        await asyncio.sleep(2)
        await _break_engine(scene, signal.SIGKILL)
        scene.load.versions.clear()
        await scene.load.wait_for_more(MORE)
    scene.outcome.seen = f"model {old} answered after all of it"
    scene.require(scene.load.versions == {old}, f"responses of {sorted(scene.load.versions)}")
    return scene.outcome


@fault("The log's pipe closed, the temporary folder removed")
async def lose_surroundings(ground: Ground) -> Outcome:
    """Neither ends or stalls anything, and a dead engine is still replaced."""
    return await _lose_output(ground, unread=False)


@fault("The log's pipe full and unread, the temporary folder removed")
async def leave_unread(ground: Ground) -> Outcome:
    """The same."""
    return await _lose_output(ground, unread=True)


async def _lose_output(ground: Ground, *, unread: bool) -> Outcome:
    folder = ground.folder / f"tmp-{unread}"
    folder.mkdir()
    async with open_scene(ground, stays_ready=False, access_log=True, environment={"TMPDIR": str(folder)}) as scene:
        shutil.rmtree(folder)
        scene.service.close_output(unread=unread)
        await scene.load.wait_for_more(5 * MORE)  # more lines than a pipe holds
        await _break_engine(scene, signal.SIGKILL)
        scene.engines = 1  # in what is read
    return scene.outcome


@fault("A full disk under the log and the temporary files, then room again")
async def fill_disk(ground: Ground) -> Outcome:
    """A new checkpoint waits for room and `/health` says so, log lines are dropped, and a dead engine is still replaced."""
    path, disk = _copy(ground), ground.folder / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=64m tmpfs "$TMPDIR" && exec "$@" 2>"$TMPDIR/log"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    settings: dict[str, Any] = {"access_log": True, "prefix": prefix, "environment": {"TMPDIR": str(disk)}}
    async with open_scene(ground, checkpoint=path, stays_ready=False, **settings) as scene:
        inside = Path(f"/proc/{scene.service.pid}/root{disk}")
        with contextlib.suppress(OSError):
            (inside / "filler").write_bytes(bytes(2**26))
        new = await asyncio.to_thread(save_another, path)
        await _health_says(scene, b"No space left")
        await _break_engine(scene, signal.SIGKILL)
        (inside / "filler").unlink()
        scene.service.send_signal(signal.SIGHUP)
        await scene.load.wait_until(lambda: new in scene.load.versions)
        scene.engines = scene.workers = 0  # in what is read
    return scene.outcome


def _copy(ground: Ground) -> Path:
    return Path(shutil.copyfile(ground.checkpoint, ground.folder / "model.safetensors"))


async def _replace(scene: Scene, path: Path, content: bytes, seen: str) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)
    await scene.says(seen)


async def _take_over(scene: Scene, path: Path) -> str:
    """Save the same model with another note in place of ``path``; return its version once it answers."""
    new = await asyncio.to_thread(save_another, path)
    await scene.load.wait_until(lambda: new in scene.load.versions)
    return new


def save_another(path: Path) -> str:
    """Save the model at ``path`` in its place, with a note that makes it another one; return its version."""
    one = load_checkpoint(path)
    metadata = one.metadata.model_copy(update={"code_revision": f"after {one.version}"})
    return save_checkpoint(path, one.weights, metadata, canary=one.canary, typicality=one.typicality)
