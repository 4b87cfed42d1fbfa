"""How much processor this process may use: affinity, cgroup quota, and the instructions it has.

Owns: reading the limits. Does not know: what the cores are used for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CPUINFO = Path("/proc/cpuinfo")


def available_cores(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Give the whole cores this process may keep busy, at least 1: the smaller of its affinity and its cgroup quotas.

    A container limited to 1.5 cores counts as 1: an extra thread would be throttled together with all others. Reads
    ``cpu.max`` (cgroup v2) or ``cpu.cfs_quota_us`` over ``cpu.cfs_period_us`` (v1) of the cgroup that ``membership`` names
    and of all above it, each of which binds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, math.floor(min([cores, *_quotas(cgroup_root, membership)])))


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
