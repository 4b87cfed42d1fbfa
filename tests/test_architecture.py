"""The direction of imports, as docs/architecture.md describes it: which package may import which, read from the source.

Every import counts, also one inside a function or under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST_FILE_LINES = 350
MOST_ROOT_MODULES = 10
PROGRAMS = ("service", "training", "benchmarks")

# From the top to the bottom: a package imports itself and those after it.
LAYERS = ("processes", "routes", "web", "observability", "engine", "runtime", "model")
ROOT_MODULES = tuple(
    f"service.{name}" for name in ("errors", "settings", "cpu", "schemas", "answers", "image_files", "stop_signals")
)
_TOP = ("service.__main__", "service.ray_app")

# What each package may import of this repository; the longest key that fits a module counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **{
        f"service.{layer}": (*(f"service.{below}" for below in LAYERS[index:]), *ROOT_MODULES)
        for index, layer in enumerate(LAYERS)
    },
    **dict.fromkeys(ROOT_MODULES, ROOT_MODULES),
    **dict.fromkeys(_TOP, ("service",)),
    "service.client": ("service.client", *ROOT_MODULES),
    "service.predict": (
        "service.predict",
        "service.model",
        "service.runtime",
        "service.engine.interface",
        "service.client",
        *ROOT_MODULES,
    ),
    "training": ("training", "service.model", "service.runtime", "service.client", *ROOT_MODULES),
    "benchmarks": ("benchmarks", "service", "training"),
    "tests": ("tests", "benchmarks", "service", "training"),
}

# What is still wrong, by rule. A violation that was mended must be deleted here too, until nothing is left.
KNOWN: dict[str, set[str]] = {
    "direction": set(),
    "circle": set(),
    "framework": set(),
    "length": set(),
}


def test_imports_go_from_the_upper_packages_to_the_lower() -> None:
    """Processes know routes, routes know web, and so on down to the modules at the root; nothing imports tests."""
    found = {
        f"{module} imports {imported}"
        for module, imports in repository_imports().items()
        for imported in imports
        if module != "service" and not may_import(module, imported)  # the package itself hands out ``Classifier``
    }
    assert found == KNOWN["direction"]


def test_no_module_imports_itself_through_others() -> None:
    """There is no circle, so every module can be read, tested and moved with only what it imports."""
    imports = repository_imports()
    assert {module for module in imports if module in reachable(module, imports)} == KNOWN["circle"]


def test_the_prediction_command_loads_no_http_framework() -> None:
    """``python -m service predict`` starts without the time that importing a web framework costs."""
    code = (
        "import importlib, pkgutil, sys, service.predict\n"
        "for module in pkgutil.iter_modules(service.predict.__path__, 'service.predict.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*({'fastapi', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) == KNOWN["framework"]


def test_no_file_is_too_long_to_read_at_once() -> None:
    """No file of the service, the training or the benchmarks is over 350 lines."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files(*PROGRAMS)}
    assert {name for name, count in lines.items() if count > LARGEST_FILE_LINES} == KNOWN["length"]


def test_few_modules_are_outside_the_packages() -> None:
    """At most ten modules lie directly in the folder of the service."""
    assert len(list((ROOT / "service").glob("*.py"))) <= MOST_ROOT_MODULES


def test_every_module_has_a_rule() -> None:
    """A new package is entered in the table above."""
    assert [module for module in repository_imports() if module != "service" and rule_of(module) is None] == []


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import service.engine.interface", {"service.engine.interface"}),
        ("from service.engine import interface", {"service.engine.interface"}),
        ("from service.engine.interface import Engine", {"service.engine.interface"}),
        ("from . import app", {"service.routes.app"}),
        ("def f():\n    from tests import support", {"tests.support"}),
        ("if TYPE_CHECKING:\n    import tests.support", {"tests.support"}),
        ("import numpy", set()),
    ],
)
def test_every_spelling_of_an_import_is_understood(code: str, imported: set[str]) -> None:
    """The module is found however it is imported."""
    modules = {"service", "service.engine", "service.engine.interface", "service.routes", "service.routes.app"}
    assert imports_of(code, "service.routes", modules | {"tests", "tests.support"}) == imported


def may_import(module: str, imported: str) -> bool:
    """Whether the table allows it. The empty ``service/__init__.py`` is nobody's concern."""
    rule = rule_of(module)
    return imported == "service" or any(_is_within(imported, allowed) for allowed in MAY_IMPORT.get(rule or "", ()))


def rule_of(module: str) -> str | None:
    """The longest key of the table that is ``module`` or a package around it."""
    return max((key for key in MAY_IMPORT if _is_within(module, key)), key=len, default=None)


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def reachable(module: str, imports: dict[str, set[str]]) -> set[str]:
    """Every module that ``module`` imports, directly or through others."""
    seen: set[str] = set()
    waiting = list(imports[module])
    while waiting:
        imported = waiting.pop()
        if imported not in seen:
            seen.add(imported)
            waiting += imports[imported]
    return seen


@cache
def repository_imports() -> dict[str, set[str]]:
    """Modules of this repository that each of its modules imports."""
    files = {module_name(path): path for path in source_files(*PROGRAMS, "tests")}
    imports = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        imports[module] = imports_of(path.read_text(), package, set(files)) - {module}
    return imports


def imports_of(code: str, package: str, modules: set[str]) -> set[str]:
    """The ones of ``modules`` that ``code``, a module of ``package``, imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                found |= {submodule if submodule in modules else source} & modules
    return found


def module_name(path: Path) -> str:
    """``service/web/entry.py`` as ``service.web.entry``; a package's own file as the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def source_files(*folders: str) -> list[Path]:
    """Python files in these folders of the repository, at any depth."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
