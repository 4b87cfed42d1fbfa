"""The README keeps up with the code: every setting, error, metric, recipe and file has its place in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.errors import ServiceError
from service.observability.metrics import METRICS
from service.settings import DEFAULT_CHECKPOINT, Settings
from training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows() -> dict[str, list[str]]:
    """The cells of every table row by its first cell, without backquotes."""
    found = {}
    for line in README.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            found[cells[0].strip("`")] = cells[1:]
    return found


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_listed_with_its_default(name: str) -> None:
    """The row of a setting says its default and its description as the code has them."""
    field = Settings.model_fields[name]
    default, description = rows()[name]
    assert description == field.description
    value = field.get_default()
    if value != DEFAULT_CHECKPOINT and isinstance(value, int | float) and not isinstance(value, bool):
        assert float(default) == value
    elif isinstance(value, str) and value:
        assert default == value


def test_no_setting_is_listed_that_is_gone() -> None:
    """The table of settings holds nothing else."""
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert listed == list(Settings.model_fields)


def error_codes(tree: type[ServiceError]) -> list[str]:
    return [tree.code, *(code for error in tree.__subclasses__() for code in error_codes(error))]


@pytest.mark.parametrize("code", error_codes(ServiceError))
def test_every_error_is_listed(code: str) -> None:
    """Each code of the tree of errors is in the table."""
    assert f"`{code}`" in README.partition("## Errors")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_listed_with_its_meaning(name: str) -> None:
    """Its row has the help text that a scrape shows."""
    assert rows()[name] == [METRICS[name].help]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_listed_with_its_length(name: str) -> None:
    """Its row has its epochs and batch size."""
    assert rows()[name][:2] == [str(RECIPES[name].epochs), str(RECIPES[name].batch_size)]


def test_every_file_that_it_shows_or_links_exists() -> None:
    """Links and pictures within the repository lead somewhere, as do the files of its commands."""
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README) + re.findall(r"@(tests/\S+?)[' ]", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_it_names_exists() -> None:
    """``make X`` in the text is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
