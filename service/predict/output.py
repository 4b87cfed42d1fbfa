"""What ``python -m service predict`` writes: a table for people, JSON lines and CSV for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from service.predict.file_classifier import Failure
from service.schemas import Answer

_OF_TYPICALITY = ("known", "typicality")


Write = Callable[[Path, Answer | Failure], object]


@contextmanager
def table(out: TextIO) -> Iterator[Write]:
    """Aligned columns, one line per answer, written at the end when their widths are known; failures are left out.

    The last two columns are empty for a model without typicality.
    """
    rows: list[tuple[str, ...]] = []

    def write(path: Path, result: Answer | Failure) -> None:
        if isinstance(result, Answer):
            cells = (f"{cell:.4f}" if isinstance(cell, float) else cell for cell in _cells(result))
            rows.append((printable(str(path)), *cells))

    yield write
    if rows:
        header = ("file", "label", "score", *("",) * (len(rows[0]) - 5), *_OF_TYPICALITY)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            out.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def json_lines(out: TextIO) -> Write:
    """One JSON object a line: ``file`` and the answer of ``POST /predict``, or ``file`` and ``error`` with code and detail."""

    def write(path: Path, result: Answer | Failure) -> None:
        line: dict[str, Any] = {"file": str(path)}
        if isinstance(result, Answer):
            line |= result.model_dump(exclude={"filename"}, exclude_unset=True)
        else:
            line["error"] = result._asdict()
        out.write(json.dumps(line) + "\n")

    return write


def csv_rows(out: TextIO, top_k: int) -> Write:
    """A header, then one row a file: the ``top_k`` best classes with their scores, typicality, or the error."""
    rows = csv.writer(out, lineterminator="\n")
    numbers = ("", *(f"_{place}" for place in range(2, top_k + 1)))
    rows.writerow(["file", *(name + number for number in numbers for name in ("label", "score")), *_OF_TYPICALITY, "error"])

    def write(path: Path, result: Answer | Failure) -> None:
        if isinstance(result, Answer):
            rows.writerow([path, *_cells(result), ""])
        else:
            rows.writerow([path, *[""] * (2 * top_k + len(_OF_TYPICALITY)), f"{result.code}: {result.detail}"])

    return write


def _cells(answer: Answer) -> list[str | float]:
    """Label and score of each class, ``known`` and typicality; empty text for what there is not."""
    known = "" if answer.known is None else "yes" if answer.known else "no"
    rest = [cell for entry in answer.predictions[1:] for cell in (entry.label, entry.score)]
    best = ["" if cell is None else cell for cell in (answer.label, answer.score)]
    return [*best, *rest, known, "" if answer.typicality is None else answer.typicality]


def printable(text: str) -> str:
    """Replace what would move a terminal's cursor, or what no terminal can show, as file names may hold either."""
    return "".join(character if character.isprintable() else "?" for character in text)
