"""The page of a run: one row for each target, and the tables behind them."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.servers.machine import describe_machine

logger = logging.getLogger(__name__)
_VERDICTS = {True: "met", False: "**not met**", None: "\N{EN DASH}"}


class Page:
    """Written to ``folder`` after each part, so that a run that is cut short leaves what it has measured."""

    def __init__(self, folder: Path, command: str) -> None:
        facts = describe_machine()
        date, name = time.strftime("%Y-%m-%d"), facts.pop("name")
        self.path = folder / f"{date}-{name}.md"
        self._began = time.monotonic()
        self._title = f"# {name}, {date}"
        self._facts = f"`{command}`, " + ", ".join(f"{fact} {value}" for fact, value in facts.items())
        self._targets: list[Sequence[str]] = []
        self._tables: list[str] = []

    def target(self, name: str, figure: str, *, met: bool | None) -> None:
        """Add the row of a target; ``met`` is None where it was not measured."""
        self._targets.append((name, figure, _VERDICTS[met]))

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of what was measured."""
        self._tables.append(f"{title}:\n\n{as_markdown(head, rows)}")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Write the page after this block; an error in it becomes the row of this part."""
        logger.info("%4.0f s: %s", time.monotonic() - self._began, name)
        try:
            yield
        except Exception as error:  # a server that does not start, a tool that is missing: the other parts are still worth it
            logger.exception("%s failed", name)
            why = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300].replace("|", "/")
            self.target(name, f"not measured: {why}", met=None)
        finally:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.text())

    def text(self) -> str:
        """Return the whole page."""
        minutes = f"measured in {(time.monotonic() - self._began) / 60:.0f} minutes"
        targets = as_markdown(("target", "measured", ""), self._targets)
        parts = (self._title, f"{self._facts}; {minutes}.", "## Targets", targets, "## Measured", *self._tables)
        return "\n\n".join(parts) + "\n"


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
