"""The servers that are compared: the command, path and kind of request of each."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.servers.server_process import ServerProcess
from service.cpu import available_cores


@dataclass(frozen=True)
class Server:
    """``command`` takes the port; ``environment`` may name the checkpoint as ``{checkpoint}``."""

    command: Callable[[int], list[str]]
    path: str = "/predict"
    raw_body: bool = False
    probe: str = "/"
    environment: dict[str, str] = field(default_factory=dict)


def _ours(_port: int) -> list[str]:
    return [sys.executable, "-m", "service", "--port=0", "--shutdown_grace_s=0"]


def _mosec(port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.servers.mosec_server", "--port", str(port)]


def _rival(workers: int, threads: int, decoders: int = 0) -> dict[str, str]:
    chosen = {"WORKERS": str(workers), "THREADS": str(threads), "DECODERS": str(decoders), "CHECKPOINT": "{checkpoint}"}
    return {f"RIVAL_{name}": value for name, value in chosen.items()} | {"OMP_NUM_THREADS": str(threads)}


def _constant(port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.servers.constant_asgi", str(port)]


_CORES = available_cores()

# The configurations that mosec documents for images: workers that decode and infer, and a stage of decoders before the model.
RIVALS: dict[str, Server] = {
    name: Server(_mosec, "/inference", raw_body=True, environment=environment)
    for name, environment in {
        "mosec, a worker per core": _rival(_CORES, 1),
        "mosec, one worker": _rival(1, _CORES),
        "mosec, a decoder per core before one model": _rival(1, _CORES, decoders=_CORES),
    }.items()
}
FORM_ONLY = "bare uvicorn, form cut"
SERVERS: dict[str, Server] = {
    "ours": Server(_ours, environment={"SERVICE_CHECKPOINT": "{checkpoint}"}),
    **RIVALS,
    FORM_ONLY: Server(_constant),
}


def start_server(
    name: str, checkpoint: Path, environment: dict[str, str] | None = None, *, folder: Path | None = None
) -> ServerProcess:
    """Make the process group of ``SERVERS[name]`` over ``checkpoint``, in ``folder`` if given; a context manager starts it."""
    server = SERVERS[name]
    port = 0 if server.command is _ours else _free_port()
    fill = {"checkpoint": str(checkpoint.resolve())}
    return ServerProcess(
        [part.format(**fill) for part in server.command(port)],
        url=f"http://127.0.0.1:{port}" if port else "",
        probe=server.probe,
        environment={key: value.format(**fill) for key, value in server.environment.items()} | (environment or {}),
        folder=folder,
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
