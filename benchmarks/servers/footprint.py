"""What a process, or a group of processes, holds and has used, from Linux's /proc: memory, threads, files, processor time."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Footprint:
    """``resident_mib`` counts shared pages too."""

    resident_mib: float
    threads: int
    open_files: int


def footprint(pid: int) -> Footprint:
    """Read it for process ``pid``; raise OSError when that is gone."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
    return Footprint(values["VmRSS"] / 1024, values["Threads"], len(os.listdir(f"/proc/{pid}/fd")))


def peer_ports(pid: int) -> set[int]:
    """Clients' ports of the TCP connections that process ``pid`` holds over IPv4."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
            inodes.add(found[1])
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].rpartition(":")[2], 16) for row in rows if row[9] in inodes} - {0}


def group_cpu_s(group: int) -> float:
    """Processor time in seconds that a process group has used so far."""
    return sum(sum(map(int, fields[11:13])) for fields in _members(group).values()) / _TICKS_PER_S


def children_cpu_s() -> float:
    """Processor time in seconds of this process's children that have ended, every ``wrk`` so far among them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def thread_cpu_s(group: int) -> dict[tuple[int, int], float]:
    """Processor time in seconds of every thread of the group, by process and thread id."""
    times = {}
    for pid in _members(group):
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                times[pid, int(path.parent.name)] = int(path.read_text().split()[0]) / 1e9
    return times


def group_resident_mb(group: int) -> float:
    """Memory of the group in megabytes; pages that several processes share are counted once."""
    total = 0
    for pid in _members(group):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[0])
    return total / 1000


def _members(group: int) -> dict[int, list[str]]:
    """Fields of /proc/PID/stat from the third on, for every process of the group by its id."""
    members = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(") ")[2].split()
            if int(fields[2]) == group:
                members[int(path.parent.name)] = fields
    return members
