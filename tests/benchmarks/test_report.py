"""The page of a run: written after each part, also when a part fails."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Page


def test_a_part_that_fails_has_a_row_that_says_why(tmp_path: Path) -> None:
    """The targets that were measured before it are on the page, and those of the next part follow."""
    page = Page(tmp_path, "make bench")
    with page.part("first"):
        page.target("a target", "2 ms", met=True)
    with page.part("second"):
        raise OSError("no wrk | no figures")
    assert "| a target | 2 ms | met |\n| second | not measured: OSError: no wrk / no figures |" in page.path.read_text()
    with page.part("third"):
        page.target("another", "3 ms", met=False)
        page.table("Rates", ["a", "b"], [["1", "2"]])
    assert "| another | 3 ms | **not met** |" in page.path.read_text()
    assert page.path.read_text().endswith("Rates:\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
