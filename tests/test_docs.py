"""The documentation keeps up with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", ".git", "runs", "data"} & set(path.relative_to(ROOT).parts))


def test_the_tables_are_those_of_the_code() -> None:
    """``make docs`` would change nothing."""
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # the code beside the pages, wherever the package is installed from
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Links and pictures within the repository, and the headings that they name, exist."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, target


def test_pages_are_short() -> None:
    """One screen for the README, one subject for a page."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for page in (ROOT / "docs").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 250, page.name


def test_every_make_target_that_is_named_exists() -> None:
    """``make X`` in a page is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", page.read_text(), re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)


def test_every_benchmark_that_is_named_exists() -> None:
    """``python -m benchmarks.X`` in a page is a module."""
    for page in PAGES:
        for module in re.findall(r"python -m (benchmarks(?:\.\w+)*)", page.read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (page.name, module)
