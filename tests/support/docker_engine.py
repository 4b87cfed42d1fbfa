"""A Docker engine as the tests use it: build, start, follow, stop, and leave nothing behind.

The command line of docker and compose, and waiting for a container's health.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_BUILD_LIMIT_S = 1800.0  # no expectation of speed: only the end of a test that would hang
_LIMIT_S = 180.0
_BUILD_ARGUMENTS = ("BASE_IMAGE", "TORCH_INDEX", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
# What a careful operator takes away from a container.
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


def missing() -> str | None:
    """Why images cannot be built and run here; None where they can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if _run("docker", "version").returncode != 0:
        return "no Docker engine answers"
    if _major_version() >= 23 and _run("docker", "buildx", "version").returncode != 0:
        return "this docker client builds only with buildx, which is not installed"
    return None


def compose_command() -> list[str] | None:
    """``docker compose`` or, where it is missing, ``docker-compose``; None without either."""
    if _run("docker", "compose", "version").returncode == 0:
        return ["docker", "compose"]
    return None if shutil.which("docker-compose") is None else ["docker-compose"]


def build(tag: str, target: str) -> None:
    """Build a target of the Dockerfile as ``tag``; build arguments come from the environment.

    The build uses the network of this machine, so that a package index or proxy on it is reached.
    """
    arguments = [f"--build-arg={name}" for name in _BUILD_ARGUMENTS if name in os.environ]
    command = ["docker", "build", "--network=host", f"--target={target}", f"--tag={tag}", *arguments, "."]
    _checked(command, limit_s=_BUILD_LIMIT_S, environment={"DOCKER_BUILDKIT": "1"})


def docker(*arguments: str) -> str:
    """Run a docker command; give its standard output; raise AssertionError with what it said when it fails."""
    return _checked(["docker", *arguments])


def compose(*arguments: str, project: str, **environment: str) -> str:
    """Run a compose command for the repository's file under a project name of its own."""
    command = compose_command()
    assert command is not None, "asked for before"
    return _checked([*command, "--project-name", project, *arguments], environment=environment)


def inspect(name: str) -> dict[str, Any]:
    """What the engine knows of a container or image."""
    (found,) = json.loads(docker("inspect", name))
    assert isinstance(found, dict)
    return found


@contextmanager
def running(image: str, *arguments: str, command: tuple[str, ...] = ()) -> Iterator[str]:
    """Start a container in the background; give its id; remove it at the end, with what it said when the test failed."""
    container = docker("run", "--detach", *HARDENED, *arguments, image, *command).strip()
    try:
        yield container
    except BaseException:
        logs = _run("docker", "logs", container)
        print(f"--- the container said ---\n{logs.stdout}{logs.stderr}")  # noqa: T201  # pytest shows it
        raise
    finally:
        docker("rm", "--force", "--volumes", container)


def wait_until_healthy(container: str) -> None:
    """Follow the engine's events from the container's creation until its health check has passed once.

    Raises AssertionError when it turns unhealthy or ends first, or after three minutes.
    """
    created = inspect(container)["Created"]
    events = subprocess.Popen(
        [
            "docker", "events", f"--since={created}", f"--until={int(time.time() + _LIMIT_S)}",
            f"--filter=container={container}", "--filter=event=health_status", "--filter=event=die",
            "--format={{.Status}}",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert events.stdout is not None, "it is a pipe"
    with events.stdout:
        first = events.stdout.readline().strip()
        events.terminate()
        events.wait()
    assert first == "health_status: healthy", f"instead of turning healthy: {first or 'nothing for too long'}"


def address(container: str, port: int) -> str:
    """Where on this machine a published port of a container is: ``http://host:port``."""
    (binding, *_) = inspect(container)["NetworkSettings"]["Ports"][f"{port}/tcp"]
    return f"http://127.0.0.1:{binding['HostPort']}"


def _major_version() -> int:
    return int(_run("docker", "version", "--format", "{{.Client.Version}}").stdout.split(".")[0])


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)


def _checked(command: list[str], *, limit_s: float = _LIMIT_S, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout
