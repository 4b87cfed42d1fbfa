"""How much processor this process may use, how its cores are shared, and which instructions it has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CPUINFO = Path("/proc/cpuinfo")


def available_cores(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the whole cores this process may keep busy, at least 1: the smaller of its affinity and its cgroup quotas.

    A container limited to 1.5 cores counts as 1: an extra thread would be throttled together with all others. Reads
    ``cpu.max`` (cgroup v2) or ``cpu.cfs_quota_us`` over ``cpu.cfs_period_us`` (v1) of the cgroup that ``membership`` names
    and of all above it, each of which binds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, math.floor(min([cores, *_quotas(cgroup_root, membership)])))


@dataclass(frozen=True)
class CoreShares:
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

    - HTTP workers: all cores but one, which the engine keeps busy, and two on two cores. With 640x480 photographs at 64
      connections, two cores give 735 to 840 requests/s with two workers of one decode thread, 590 with one worker of two.
    - Decode threads: one for each core, divided among the workers.
    - Model: one thread for each core, and a stream for each thread. Two streams of one thread do more on a busy machine than
      one stream of two threads, which wait for each other at every layer.
    """
    workers = workers or max(cores - 1, min(cores, 2))
    cpu_threads = cpu_threads or cores
    return CoreShares(workers, decode_threads or max(1, cores // workers), cpu_threads, streams or cpu_threads)


def has_int8_dot_products(cpuinfo: Path = CPUINFO) -> bool:
    """Whether int8 products accumulate in 32 bits (VNNI, AMX, or Arm's dotprod); older instructions saturate at 16."""
    return _has_any({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}, cpuinfo)


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere libraries emulate it, slower than float32."""
    return _has_any({"avx512_bf16", "amx_bf16", "bf16"}, cpuinfo)


def has_bf16_tiles(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies whole tiles of bfloat16 (AMX)."""
    return _has_any({"amx_bf16"}, cpuinfo)


def _has_any(flags: set[str], cpuinfo: Path) -> bool:
    try:
        return not flags.isdisjoint(cpuinfo.read_text().split())
    except OSError:
        return False


def _quotas(root: Path, membership: Path) -> Iterator[float]:
    """Yield every quota that can be seen, in cores; a container may see its own as the root, whatever its path is."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    yield from (quota for quota in (_quota_v2(root), _quota_v1(root / "cpu")) if quota is not None)
    for line in lines:  # number:controllers:path, the controllers empty for v2 (cgroups(7))
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base, quota_of = (root / "cpu", _quota_v1) if controllers else (root, _quota_v2)
        parts = PurePosixPath(path).parts[1:]
        if ".." in parts:  # outside of this namespace, so nothing of it can be seen
            continue
        for depth in range(1, len(parts) + 1):
            quota = quota_of(base.joinpath(*parts[:depth]))
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
