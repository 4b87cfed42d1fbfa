"""The locked requirements are those of pyproject.toml: complete, within its bounds, and with hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
# What each set locks beside the service's own dependencies, and in which files.
_SETS = {
    "serve": (["heif", "tracing"], ["serve.txt"]),
    "gpu": (["heif", "tracing", "torch"], ["gpu.txt", "gpu-torch.txt"]),
    "training": (["heif", "tracing", "training"], ["training.txt", "training-torch.txt"]),
}


@pytest.mark.parametrize("name", _SETS)
def test_the_lock_has_what_pyproject_asks_for(name: str) -> None:
    """Every requirement is locked, for each Python at a version that pyproject.toml admits; else run ``make lock``."""
    extras, files = _SETS[name]
    locked: dict[str, list[str]] = {}
    for file in files:
        for found in re.finditer(r"^([\w.-]+)==([^\s;]+)", (_ROOT / "requirements" / file).read_text(), re.MULTILINE):
            locked.setdefault(canonicalize_name(found[1]), []).append(found[2])
    asked = [*_PROJECT["dependencies"], *(line for extra in extras for line in _PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, asked):
        versions = locked.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement} is not locked"
        assert all(requirement.specifier.contains(version) for version in versions), (str(requirement), versions)


@pytest.mark.parametrize("name", _SETS)
def test_every_locked_package_has_a_hash(name: str) -> None:
    """So that pip refuses a file that is not the one that was locked."""
    text = (_ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", "")
    assert [line for line in text.splitlines() if "--hash=sha256:" not in line] == []


def test_every_dependency_has_a_line_in_the_architecture() -> None:
    """``docs/architecture.md`` says what each is for."""
    table = (_ROOT / "docs" / "architecture.md").read_text().partition("## Dependencies")[2]
    extras = (lines for extra, lines in _PROJECT["optional-dependencies"].items() if extra != "dev")
    names = {Requirement(line).name for line in sum(extras, _PROJECT["dependencies"])}
    names.discard("opentelemetry-exporter-otlp-proto-http")  # written with opentelemetry-sdk, as -exporter-otlp-proto-http
    assert {name for name in names if not re.search(rf"^\|[^|]*\b{name}\b", table, re.MULTILINE)} == set()
