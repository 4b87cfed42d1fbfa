"""``make docs``: writes the tables of the documentation from the code's registries, between their markers.

A page holds ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between them is replaced. With ``--check`` nothing is
written, and the exit status is 1 if a page is not up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from service.errors import ERRORS
from service.observability.metrics import METRICS
from service.settings import DEFAULT_CHECKPOINT, Settings, choices
from training.recipes import RECIPES

FOLDER = Path(__file__).parent
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def settings() -> Iterator[tuple[str, ...]]:
    """One row for each setting: name, default, meaning."""
    yield "setting", "default", "meaning"
    for name, field in Settings.model_fields.items():
        among = f" (`{'`, `'.join(choices(name))}`)" if choices(name) else ""
        yield f"`{name}`", _default(field.get_default()), (field.description or "") + among


def errors() -> Iterator[tuple[str, ...]]:
    """One row for each error: status, code, when it is sent."""
    yield "status", "code", "when"
    for error in sorted(ERRORS, key=lambda error: (error.status, error.code)):
        yield str(error.status), f"`{error.code}`", " ".join((error.__doc__ or "").split()).rstrip(".").replace("``", "`")


def metrics() -> Iterator[tuple[str, ...]]:
    """One row for each metric: name, type, labels, meaning."""
    yield "metric", "type", "labels", "meaning"
    for name, metric in METRICS.items():
        yield f"`{name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help


def recipes() -> Iterator[tuple[str, ...]]:
    """One row for each training recipe: name, epochs, batch size, augmentation."""
    yield "recipe", "epochs", "batch", "augmentation that is on"
    for name, recipe in RECIPES.items():
        off = asdict(type(recipe.augmentation)())
        on = {key: value for key, value in asdict(recipe.augmentation).items() if value != off[key]}
        yield (
            f"`{name}`",
            str(recipe.epochs),
            str(recipe.batch_size),
            ", ".join(f"{key} {value}" for key, value in on.items()) or "none",
        )


def routes() -> Iterator[tuple[str, ...]]:
    """One row for each route of the OpenAPI document: method, path, summary."""
    yield "method", "path", "what it does"
    for path, operations in _openapi()["paths"].items():
        for method, operation in operations.items():
            if method != "head":
                yield method.upper(), f"`{path}`", operation.get("summary", "")


def targets() -> Iterator[tuple[str, ...]]:
    """One row for each target of speed, from the newest page that ``make bench`` wrote."""
    pages = sorted((FOLDER.parent / "benchmarks" / "results").glob("*.md"))
    texts = [(page, text) for page in pages if "\n## Targets\n" in (text := page.read_text())]
    yield "target", "measured", f"[{texts[-1][0].stem}](../benchmarks/results/{texts[-1][0].name})" if texts else ""
    section = texts[-1][1].partition("\n## Targets\n")[2].partition("\n## ")[0] if texts else ""
    for line in section.strip().splitlines()[2:]:
        yield tuple(cell.strip() for cell in line.strip("|").split("|"))


TABLES: dict[str, Callable[[], Iterator[tuple[str, ...]]]] = {
    "settings": settings,
    "errors": errors,
    "metrics": metrics,
    "recipes": recipes,
    "routes": routes,
    "targets": targets,
}


def table(name: str) -> str:
    """Return the Markdown table ``name`` of ``TABLES``."""
    head, *rows = TABLES[name]()
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def up_to_date(page: str) -> str:
    """Return the text of a page with its tables made again."""
    return _PLACE.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def main(arguments: list[str]) -> int:
    """Write the tables, or check them; return the exit status."""
    stale = []
    for path in sorted(FOLDER.glob("*.md")):
        page = path.read_text()
        new = up_to_date(page)
        if new != page:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(new)
    if stale and "--check" in arguments:
        sys.stderr.write(f"run `make docs`: {', '.join(stale)} is not up to date\n")
        return 1
    return 0


def _default(value: Any) -> str:
    if value == DEFAULT_CHECKPOINT:
        return "the one in the package"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value not in (None, "") else "\N{EN DASH}"


def _openapi() -> dict[str, Any]:
    from service.engine.interface import Engine
    from service.observability.metrics import ENGINE, make_values
    from service.routes.app import Application

    class NoEngine(Engine):
        """An engine that never becomes ready: the document needs none."""

        def _begin(self, request: Any) -> None:
            raise NotImplementedError

        _withdraw = _begin

    engine = NoEngine(make_values(workers=1).facts(ENGINE), max_batch_size=1, max_queue_images=1, on_change=lambda: None)
    return Application(Settings.model_validate({}), engine).openapi


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
