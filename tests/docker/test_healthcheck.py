"""The container's health check, run as the container runs it, against a socket that says what the test wants."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.servers.certificate import self_signed
from benchmarks.servers.service_process import ServiceProcess

_SCRIPT = Path(__file__).parents[2] / "docker" / "healthcheck.py"


def check(process: int) -> subprocess.CompletedProcess[str]:
    """Run it for the socket that ``process`` listens on."""
    command = [sys.executable, "-I", "-S", str(_SCRIPT), str(process)]
    return subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def answering(answer: bytes) -> Iterator[None]:
    """Send ``answer`` to every connection to a free port, whatever it asks, and close it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_all() -> None:
            with suppress(OSError):  # the end
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(answer)

        thread = threading.Thread(target=answer_all)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_ready_service_is_healthy(service: ServiceProcess) -> None:
    """The status is 0, and the engine keeps what health said."""
    result = check(service.pid)
    assert (result.returncode, result.stderr) == (0, "")
    assert '"status":"ready"' in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "0.0.0.0", "::"])
def test_any_address_with_tls_is_found(checkpoint_path: Path, tmp_path: Path, host: str) -> None:
    """The check needs no setting: not the address, not the port, not that TLS is on."""
    with ServiceProcess(checkpoint_path, host=host, workers=1, **self_signed(tmp_path)) as service:
        result = check(service.pid)
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
    with answering(answer):
        result = check(os.getpid())
    assert (result.returncode, result.stderr) == (1, "")


def test_nothing_that_listens_is_not_healthy() -> None:
    """A socket that is bound and does not listen is none."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        result = check(os.getpid())
    assert (result.returncode, result.stdout, result.stderr) == (1, "no answer: nothing listens", "")
