"""Which revision of the code trains, for the checkpoint's metadata."""

from __future__ import annotations

import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def code_revision() -> str:
    """Return git's short description of this working tree, or ``unknown`` outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    if not (_ROOT / ".git").exists():  # installed somewhere else, perhaps inside another project's checkout
        return "unknown"
    try:
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
