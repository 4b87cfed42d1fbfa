"""Bound on the memory that request bodies and images under decode may fill together in one process."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from service.cpu import cgroup_folders
from service.errors import MemoryBudgetExceeded

_SHARE = 0.4  # of the machine's or the container's memory, for all processes of the service that read requests
_RETRY_AFTER_S = 1
_NOTABLE_BYTES = 2**22


class MemoryBudget:
    """Counts bytes in use against ``limit_bytes``; safe to use from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = self._peak_bytes = 0
        self._lock = threading.Lock()

    def acquire(self, count: int) -> None:
        """Take ``count`` bytes; raise MemoryBudgetExceeded where fewer are left."""
        with self._lock:
            if self.used_bytes + count > self.limit_bytes:
                raise MemoryBudgetExceeded(
                    "the service has no memory left for this request now; retry shortly", retry_after_s=_RETRY_AFTER_S
                )
            self.used_bytes += count
            self._peak_bytes = max(self._peak_bytes, self.used_bytes)

    def release(self, count: int) -> None:
        """Give back ``count`` bytes that were acquired."""
        with self._lock:
            self.used_bytes -= count
        assert self.used_bytes >= 0, "more bytes were released than acquired"

    def has_fallen(self) -> bool:
        """Whether most of what was in use is not any more, since the last time that this was so; true for 4 MiB or more."""
        if max(4 * self.used_bytes, _NOTABLE_BYTES) > self._peak_bytes:
            return False
        self._peak_bytes = self.used_bytes
        return True


def default_budget_bytes(processes: int) -> int:
    """Return the bytes for each of ``processes``: together four tenths of the memory this container or machine has."""
    return int(memory_limit_bytes() * _SHARE / processes)


def memory_limit_bytes(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the machine's memory or the smallest limit of the cgroups that this process is in (v2 and v1)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in cgroup_folders("memory", cgroup_root, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # there is none, or "max"
                limits.append(int((folder / name).read_text()))
    return min(limits)
