"""A Ray cluster on this machine as a person makes one: ``ray start`` for each node, ``serve start``, ``serve run``.

Each node is a session of processes with ports of its own, and nothing of it is left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.support.patience import wait_until

_ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_PATIENCE_S = 180.0  # no expectation of speed: only the end of a test that would hang


class RayCluster:
    """A head with ``cpus`` and Ray's proxy; ``add_node`` adds a node with one CPU."""

    def __init__(self, cpus: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # a socket's path must be short
        folder = Path(self._folder.name)
        gcs, dashboard, http = _free_ports(3)
        self.url = f"http://127.0.0.1:{http}"
        self._dashboard = f"http://127.0.0.1:{dashboard}"
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(("SERVICE_", "RAY_"))}
        self._environment = {
            **inherited,
            "PYTHONPATH": str(_ROOT),
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_USAGE_STATS_ENABLED": "0",
            # One proxy for all nodes here, which would otherwise ask the replicas on its own node alone.
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
            # A proxy that takes longer than this to start, three times over, is killed: 5 s are too short on a busy machine.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        }
        self._head = ("--head", f"--num-cpus={cpus}", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}")
        self._http_port = http
        self._sessions: list[int] = []

    def __enter__(self) -> Self:
        """Start the head and Serve."""
        try:
            self._start_node("127.0.0.1", *self._head)
            self._run("serve", "start", f"--http-port={self._http_port}", "--proxy-location=HeadOnly")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Kill every node."""
        self._end()

    @contextlib.contextmanager
    def add_node(self) -> Iterator[int]:
        """Add a node with one CPU for the ``with`` block; give its session's id."""
        session = self._start_node("127.0.0.2", "--num-cpus=1", f"--address={self._environment['RAY_ADDRESS']}")
        try:
            yield session
        finally:
            _kill_session(session)

    def deploy(self, replicas: int, **settings: object) -> None:
        """Serve the application, or update the one that is served, and wait until it is as asked."""
        environment = {f"SERVICE_{name.upper()}": str(value) for name, value in settings.items()}
        scale = (f"min_replicas={replicas}", f"max_replicas={replicas}")
        self._run("serve", "run", "--non-blocking", "service.ray_app:app", *scale, environment=environment)
        wait_until(lambda: len(self.replica_pids()) == replicas)

    def replica_pids(self) -> list[int]:
        """The process ids of the replicas that Ray says are running."""
        answer = httpx.get(f"{self._dashboard}/api/serve/applications/", timeout=_PATIENCE_S).raise_for_status().json()
        replicas = answer["applications"]["default"]["deployments"]["service"]["replicas"]
        return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]

    def _start_node(self, address: str, *options: str) -> int:
        """Start a node; give the id of its session, in which its processes stay whatever groups they make."""
        command = ("ray", "start", f"--node-ip-address={address}", *options)
        try:
            session = self._run(*command)
        except AssertionError:  # Ray gives a node 30 s to start, which a busy machine exceeds
            session = self._run(*command)
        self._sessions.append(session)
        return session

    def _run(self, *command: str, environment: dict[str, str] | None = None) -> int:
        """Run one of Ray's commands to its end, in a session of its own; give the session's id."""
        log = Path(self._folder.name) / f"{command[0]}-{command[1]}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(_BIN / command[0]), *command[1:]],
                cwd=_ROOT,
                env={**self._environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                status = None
        if status != 0:
            _kill_session(process.pid)
            process.wait()
            raise AssertionError(f"{' '.join(command)} ended with {status}:\n{log.read_text()}")
        return process.pid

    def _end(self) -> None:
        for session in self._sessions:
            _kill_session(session)
        self._folder.cleanup()


def session_pids(session: int) -> list[int]:
    """The process ids of a session that have not ended."""
    pids = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):  # it has just ended, or is no process
            if os.getsid(int(entry)) == session and "\nState:\tZ" not in Path(f"/proc/{entry}/status").read_text():
                pids.append(int(entry))
    return pids


def send_signal(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to those that have not ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_session(session: int) -> None:
    def is_gone() -> bool:
        pids = session_pids(session)
        send_signal(pids, signal.SIGKILL)
        return not pids

    wait_until(is_gone)


def _free_ports(count: int) -> list[int]:
    """Give ports that are free now, since Ray's options take no 0; all are held at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
