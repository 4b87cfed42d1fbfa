"""The soak test in short: requests of every kind, and nothing of them is left over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.resilience.soak import make_kinds, run_soak, soak_service


@pytest.mark.slow
def test_thousands_of_mixed_requests_leave_nothing_behind(checkpoint_path: Path) -> None:
    """Every answer is the right one, and afterwards no process has more open files, threads or much more memory."""
    with soak_service(checkpoint_path, workers=2) as service:
        soak = asyncio.run(run_soak(service, 4000, workers=2))
    assert soak.failures() == []
    assert {kind for phase in soak.phases for kind, _ in phase.outcomes} == set(make_kinds())
