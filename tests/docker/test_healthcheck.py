"""The container's health check, run as the container runs it, against a socket that says what the test wants."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.servers.service_process import ServiceProcess

_SCRIPT = Path(__file__).parents[2] / "docker" / "healthcheck.py"


def check(port: str) -> subprocess.CompletedProcess[str]:
    """Run it with ``SERVICE_PORT`` set to ``port`` and nothing else from the environment."""
    command = [sys.executable, "-I", "-S", str(_SCRIPT)]
    return subprocess.run(command, env={"SERVICE_PORT": port}, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Accept one connection on a free port, send ``answer`` whatever is asked, and close it; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        yield str(listener.getsockname()[1])
        thread.join()


def test_a_ready_service_is_healthy(service: ServiceProcess) -> None:
    """The status is 0, and the engine keeps what health said."""
    result = check(service.url.rsplit(":", 1)[1])
    assert (result.returncode, result.stderr) == (0, "")
    assert '"status":"ready"' in result.stdout


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
    ],
)
def test_anything_but_200_is_not_healthy(answer: bytes) -> None:
    """Not ready, another service, another protocol, a connection that is closed: status 1 and no traceback."""
    with answering(answer) as port:
        result = check(port)
    assert (result.returncode, result.stderr) == (1, "")


def test_nothing_that_listens_is_not_healthy() -> None:
    """A refused connection is told in words."""
    with socket.socket() as bound:  # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        result = check(str(bound.getsockname()[1]))
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.startswith("no answer")
