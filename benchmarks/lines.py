"""``python -m benchmarks.lines``: lines of code by package; blank lines, comments and docstrings do not count."""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

FOLDERS = ("service", "training", "benchmarks", "tests")
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> int:
    """Number of lines of a Python file that hold code."""
    lines: set[int] = set()
    texts = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(1 for line in lines if texts[line - 1].strip())


def main() -> int:
    """Print a line for each package and each folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lines", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the checkout to count")
    root = parser.parse_args().root
    for folder in FOLDERS:
        counts: Counter[Path] = Counter()
        for path in (root / folder).rglob("*.py"):
            counts[path.parent.relative_to(root)] += code_lines(path.read_text())
        for package, count in sorted(counts.items()):
            print(f"{count:7,}  {package}")
        print(f"{counts.total():7,}  {folder} in all\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
