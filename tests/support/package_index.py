"""Installing packages in a test: where no index is reached the test is skipped, and any other failure is one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_LIMIT_S = 600.0  # no expectation of speed: only the end of a test that would hang
_UNREACHED = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "EAI_AGAIN", "ENOTFOUND", "ECONNREFUSED")


def install(*command: str | Path, folder: Path | None = None) -> None:
    """Run pip or npm in ``folder``. Skip the test where no index is reached; raise AssertionError with what it said else."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0 and any(sign in said for sign in _UNREACHED):
        pytest.skip("no package index is reached")
    assert done.returncode == 0, said
