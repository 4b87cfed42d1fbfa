"""The wheel serves by itself: installed in an empty environment, outside the checkout."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import service
from benchmarks.servers.server_process import ServerProcess
from tests.support.package_index import install

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[1]
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources with the setuptools that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("service", "training"):
        shutil.copytree(_ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, folder / "sources")
    install(*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "sources")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The ``bin`` folder of an environment that has the wheel, what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    install(*_PIP, "--python", folder / "bin" / "python", "install", wheel)
    yield folder / "bin"
    shutil.rmtree(folder)


def test_everything_is_in_the_wheel(wheel: Path) -> None:
    """Each tracked file of both packages: code, type marker, checkpoint with its card, the page. Nothing else is."""
    tracked = subprocess.run(
        ["git", "ls-files", "service", "training"], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == set(tracked.stdout.split())
    assert {"service/py.typed", "training/py.typed", "service/page/index.html"} <= packed
    assert "service/checkpoints/resnet18-cifar10.safetensors" in packed


def test_the_installed_service_predicts(installed: Path, tmp_path: Path, image_paths: list[Path]) -> None:
    """The console script starts it; a prediction, the page and the version come from it."""
    environment = {"SERVICE_PORT": "0", "SERVICE_SHUTDOWN_GRACE_S": "0", "PYTHONPATH": ""}
    with ServerProcess([str(installed / "predict-service")], environment=environment, folder=tmp_path) as server:
        answer = httpx.post(f"{server.url}/predict", files={"file": image_paths[0].read_bytes()}, timeout=60)
        assert answer.json()["label"] == image_paths[0].name.split("-")[0]
        assert "<h1>" in httpx.get(server.url + "/", timeout=60).text
        assert httpx.get(server.url + "/health", timeout=60).json()["version"] == service.__version__
        assert server.stop() == 0


@pytest.mark.parametrize("command", [["predict-service"], ["python", "-m", "service"]])
def test_the_installed_version_is_told(installed: Path, tmp_path: Path, command: list[str]) -> None:
    """By the console script and by the module alike."""
    done = subprocess.run(
        [installed / command[0], *command[1:], "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == service.__version__


def test_every_console_script_has_its_function() -> None:
    """What pyproject.toml names can be called."""
    scripts = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
