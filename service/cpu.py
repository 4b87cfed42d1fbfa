"""How much processor this process may use, how its cores are shared, and which instructions it has."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CPUINFO = Path("/proc/cpuinfo")


def available_cores(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the whole cores this process may keep busy, at least 1: the smaller of its affinity and its cgroup quotas.

    A container limited to 1.5 cores counts as 1: an extra thread would be throttled together with all others. Reads
    ``cpu.max`` (cgroup v2) or ``cpu.cfs_quota_us`` over ``cpu.cfs_period_us`` (v1) of the cgroup that ``membership`` names
    and of all above it, each of which binds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, math.floor(min([cores, *map(_quota, cgroup_folders("cpu", cgroup_root, membership))])))


class CoreShares(NamedTuple):
    """How the service uses the cores; the last two are those of a model on the CPU.

    ``workers`` are HTTP worker processes, each with ``decode_threads`` for large images. The model has ``cpu_threads`` in all,
    in ``streams`` that run concurrently.
    """

    workers: int
    decode_threads: int
    cpu_threads: int
    streams: int


def share_cores(cores: int, *, workers: int = 0, decode_threads: int = 0, cpu_threads: int = 0, streams: int = 0) -> CoreShares:
    """Return the one decision about ``cores``: what is not 0 was chosen by the user and stays.

    More threads than cores are ready to run, so that no core idles while one kind of work waits; the system shares the time.

    - HTTP workers: all cores but one, which the engine keeps busy. Two on two cores would take more time for a request, since
      an iteration of an event loop handles fewer: 0.94 of the rate for 32x32 pixels at 64 connections. For photographs of
      640x480 they do as much at 64 connections, and 1.1 at 256.
    - Decode threads: one for each core, divided among the workers.
    - Model: one thread for each core, and a stream for each thread. Two streams of one thread do more on a busy machine than
      one stream of two threads, which wait for each other at every layer.
    """
    workers = workers or max(cores - 1, 1)
    cpu_threads = cpu_threads or cores
    return CoreShares(workers, decode_threads or max(1, cores // workers), cpu_threads, streams or cpu_threads)


def has_int8_dot_products(cpuinfo: Path = CPUINFO) -> bool:
    """Whether int8 products accumulate in 32 bits (VNNI, AMX, or Arm's dotprod); older instructions saturate at 16."""
    return has_any({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}, cpuinfo)


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere libraries emulate it, slower than float32."""
    return has_any({"avx512_bf16", "amx_bf16", "bf16"}, cpuinfo)


def has_any(flags: set[str], cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor has one of these ``flags`` of Linux; False where they cannot be read."""
    try:
        return not flags.isdisjoint(cpuinfo.read_text().split())
    except OSError:
        return False


def cgroup_folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders in which ``controller`` (v2 or v1) may limit this process, as far as they can be seen.

    They are those of the cgroups that ``membership`` names and of all above them; a container may see its own as the root.
    """
    yield root
    yield root / controller
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, the controllers empty for v2 (cgroups(7))
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / controller if controllers else root
        parts = PurePosixPath(path).parts[1:]
        if ".." not in parts:  # else it is outside of this namespace, and nothing of it can be seen
            yield from itertools.islice(itertools.accumulate(parts, Path.joinpath, initial=folder), 1, None)


def _quota(folder: Path) -> float:
    """Return the quota in a folder of a cgroup (v2, or v1), in cores; infinite where it has none."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota > 0:
                return quota / period
    return math.inf
