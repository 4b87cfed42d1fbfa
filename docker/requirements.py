"""Print the requirements of an image, one a line, from pyproject.toml beside this file.

Owns: which part of pyproject.toml an image needs. Does not know: where packages come from.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, part: str) -> list[str]:
    """Give the dependencies of the ``service`` itself, or those that an optional ``part`` adds; raise KeyError for another."""
    project = tomllib.loads(pyproject.read_text())["project"]
    chosen: list[str] = project["dependencies"] if part == "service" else project["optional-dependencies"][part]
    return chosen


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in requirements(Path(__file__).with_name("pyproject.toml"), sys.argv[1]))
