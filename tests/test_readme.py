"""Every command of the README does what it says there, in a fresh clone, as a newcomer types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageOps

from benchmarks.servers.server_process import ServerProcess
from tests.support.docker_engine import build, compose_command, missing

_ROOT = Path(__file__).parents[1]
_BLOCKS = re.findall(r"^```(?:sh|console)\n(.*?)^```", (_ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
_COMMANDS = [line.removeprefix("$ ") for block in _BLOCKS for line in block.splitlines() if not line.startswith("{")]
_SERVE, _COMPOSE, _PREDICT, _TRAIN, _SERVE_OWN, _EVALUATE = range(6)
_LIMIT_S = 800
# A newcomer's shell: nothing of a make around the tests. One epoch is enough to see that the command works.
_CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "SERVICE_")) and name != "MFLAGS"}
_ENVIRONMENT = {**_CLEAN, "PYTHON": sys.executable, "MAKEFLAGS": "EPOCHS=1"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tracked files as they are now, and a newcomer's folder of photos."""
    folder = tmp_path_factory.mktemp("newcomer") / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=60)
    for name in filter(None, tracked.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (_ROOT / name).exists():
            shutil.copy2(_ROOT / name, folder / name)
    for path in (_ROOT / "tests" / "images").glob("*.png"):
        photos = folder / "photos" / path.name.split("-")[0]
        photos.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, photos)
        ImageOps.mirror(Image.open(path)).save(photos / f"mirrored-{path.name}")
    yield folder
    shutil.rmtree(folder)


@contextmanager
def served(command: str, clone: Path) -> Iterator[None]:
    """Run a command that serves on port 8000, until it is ready."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000 is in use")
    with ServerProcess(["bash", "-c", command], environment=_ENVIRONMENT, folder=clone) as server:
        assert server.url.endswith(":8000")
        yield


def run(command: str, clone: Path) -> str:
    """Run a command in the clone; return what it prints; raise AssertionError with what it says when it fails."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=_ENVIRONMENT, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_these_are_all_commands() -> None:
    """A command that is added to the README is run below."""
    starts = ("make serve", "docker compose up", "curl ", "make train ", "SERVICE_CHECKPOINT=", ".venv/bin/python -m training")
    assert len(_COMMANDS) == len(starts)
    assert all(command.startswith(start) for command, start in zip(_COMMANDS, starts, strict=True))


@pytest.mark.slow
def test_serve_and_ask(clone: Path) -> None:
    """``make serve`` sets up what it needs and no torch; the answer to ``curl`` is the one that is shown."""
    shown = json.loads(next(line for block in _BLOCKS for line in block.splitlines() if line.startswith("{")))
    run("make .venv/.serve", clone)  # first, since it takes longer than a start may
    with served(_COMMANDS[_SERVE], clone):
        answer = json.loads(run(_COMMANDS[_PREDICT], clone))
    assert answer.keys() == shown.keys()
    assert answer["label"] == shown["label"]
    assert answer["score"] == pytest.approx(shown["score"], abs=0.01)


@pytest.mark.slow
def test_train_serve_and_evaluate(clone: Path) -> None:
    """Three commands, from photos to their own model. Torch is this environment's: its download is not part of the test."""
    if not (clone / ".venv").exists():
        subprocess.run([sys.executable, "-m", "venv", clone / ".venv"], check=True, timeout=_LIMIT_S)
    (packages,) = (clone / ".venv" / "lib").glob("python*/site-packages")
    (packages / "this_environment.pth").write_text(sysconfig.get_paths()["purelib"])
    for marker in (".serve", ".training"):
        (clone / ".venv" / marker).touch()
    run(_COMMANDS[_TRAIN], clone)
    with served(_COMMANDS[_SERVE_OWN], clone):
        assert httpx.get("http://localhost:8000/health", timeout=60).json()["model"]["name"] == "photos"
    assert "accuracy" in run(_COMMANDS[_EVALUATE], clone)


@pytest.mark.slow
def test_compose(clone: Path) -> None:
    """The image is built and serves."""
    if reason := missing():
        pytest.skip(reason)
    if (compose := compose_command()) is None:
        pytest.skip("docker compose is not installed")
    spelled = " ".join(compose)  # an older one is a program of its own
    build("cifar10-prediction-service:cpu", "cpu")  # first, since it takes longer than a start may
    try:
        with served(_COMMANDS[_COMPOSE].replace("docker compose", spelled), clone):
            assert httpx.get("http://localhost:8000/health", timeout=60).json()["status"] == "ready"
    finally:
        run(f"{spelled} down --volumes", clone)
