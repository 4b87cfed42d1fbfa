"""The memory budget: refused past its limit, free again afterwards, and read from the container's limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import MemoryBudgetExceeded
from service.web.memory_budget import MemoryBudget, memory_limit_bytes


def test_the_limit_can_be_filled_and_no_more() -> None:
    """What does not fit is refused with a time to retry after, and takes nothing."""
    budget = MemoryBudget(100)
    with budget.holding(60), budget.holding(40):
        with pytest.raises(MemoryBudgetExceeded) as caught:
            budget.acquire(1)
        assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
        assert budget.used_bytes == 100
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("line", "folder", "file"),
    [
        ("0::/pods/one", "pods/one", "memory.max"),
        ("0::/pods/one", "pods", "memory.max"),
        ("0::/elsewhere", "", "memory.max"),
        ("9:cpu,memory:/pod", "memory/pod", "memory.limit_in_bytes"),
    ],
)
def test_the_smallest_limit_binds(tmp_path: Path, line: str, folder: str, file: str) -> None:
    """The process's own cgroup or one above it, of version 2 or 1."""
    membership = tmp_path / "membership"
    membership.write_text(line + "\n")
    limited = tmp_path / "cgroup" / folder
    limited.mkdir(parents=True)
    assert memory_limit_bytes(tmp_path / "cgroup", membership) > 1_000_000
    (limited / file).write_text("1000000\n")
    assert memory_limit_bytes(tmp_path / "cgroup", membership) == 1_000_000
    (limited / file).write_text("max\n")
    assert memory_limit_bytes(tmp_path / "cgroup", membership) > 1_000_000
