"""The workflow files: as actionlint wants them, and calling what a person calls."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

_ROOT = Path(__file__).parents[1]
_WORKFLOWS = sorted((_ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint")
def test_actionlint_finds_nothing() -> None:
    """Syntax, expressions, names of inputs, and the shell commands."""
    done = subprocess.run(["actionlint", *_WORKFLOWS], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", _WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_exists(path: Path) -> None:
    """Every make target and script of a step is one of this repository."""
    makefile = (_ROOT / "Makefile").read_text()
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for job in jobs.values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [])
        steps = [step["run"] for step in job["steps"] if "run" in step]
        targets += [found for step in steps for found in re.findall(r"^make ([a-z-]+)$", step)]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
        assert all((_ROOT / step).exists() for step in steps if step.startswith(".ci/"))


def test_every_supported_python_is_checked() -> None:
    """From the oldest that pyproject.toml admits; the one of the images is among them."""
    checked = yaml.safe_load((_ROOT / ".github" / "workflows" / "checks.yml").read_text())["jobs"]["checks"]["strategy"][
        "matrix"
    ]
    oldest = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    base = re.search(r"BASE_IMAGE=python:(\d+\.\d+)", (_ROOT / "Dockerfile").read_text())
    assert base is not None
    assert checked["python"][0] == oldest
    assert base[1] in checked["python"]
