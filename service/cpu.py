"""How much processor this process may use: affinity, cgroup quota, and the instructions it has.

Owns: reading the limits. Does not know: what the cores are used for.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Give the whole cores this process may keep busy, at least 1: the smaller of its affinity and its cgroup quota.

    A container limited to 1.5 cores counts as 1: an extra thread would be throttled together with all others. Reads
    ``cpu.max`` (cgroup v2) or ``cpu.cfs_quota_us`` over ``cpu.cfs_period_us`` (v1).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _quota_v2(cgroup_root)
    if quota is None:
        quota = _quota_v1(cgroup_root)
    return max(1, cores if quota is None else min(cores, math.floor(quota)))


def has_int8_dot_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether int8 products accumulate in 32 bits (VNNI, AMX, or Arm's dotprod); older instructions saturate at 16."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


def _quota_v2(root: Path) -> float | None:
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(root: Path) -> float | None:
    try:
        quota = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError):
        return None
