"""What a process holds, as the kernel tells it: memory, threads, open files and the connections among them.

Linux only. Does not know: which process it is.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """``resident_mib`` counts shared pages too."""

    resident_mib: float
    threads: int
    open_files: int


def footprint(pid: int) -> Footprint:
    """Look at process ``pid``; raise OSError when it is gone."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
    return Footprint(values["VmRSS"] / 1024, values["Threads"], len(os.listdir(f"/proc/{pid}/fd")))


def peer_ports(pid: int) -> set[int]:
    """Give the clients' ports of the TCP connections that process ``pid`` holds over IPv4."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
            inodes.add(found[1])
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[2].rpartition(":")[2], 16) for row in rows if row[9] in inodes} - {0}
