"""The real service as a child process: ``python -m service`` on a free port."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.servers.server_process import ServerProcess

_ROOT = Path(__file__).parents[2]


class ServiceProcess(ServerProcess):
    """A service that is ready when the ``with`` block begins, and killed with all its children when it ends.

    >>> with ServiceProcess(checkpoint_path, workers=2, max_batch_size=8) as service:
    ...     httpx.get(service.url + "/health")

    Any setting can be given by its name; no setting comes from the caller's own environment. By default the service
    takes a free port and stops without a grace period. ``prefix`` is a command that becomes the service.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        until_ready: bool = True,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        **settings: object,
    ) -> None:
        settings = {"port": 0, "shutdown_grace_s": 0, "checkpoint": checkpoint, **settings}
        variables = {f"SERVICE_{name.upper()}": str(value) for name, value in settings.items()}
        command = [*prefix, sys.executable, "-m", "service"]
        super().__init__(command, environment=variables | (environment or {}), folder=_ROOT, until_ready=until_ready)

    def __exit__(self, *raised: Any) -> None:
        """Kill what is left of it, stopped processes too; show its output after an error."""
        self.kill()
        self._show_output(raised[1])

    def connect(self) -> socket.socket:
        """Open a connection to the service, for what no HTTP client would send."""
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=60)

    @property
    def engine_pid(self) -> int:
        """Process id of the engine, also where nobody reads the output."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "engine\n")

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of every engine since the start, the newest last."""
        return [int(pid) for pid in re.findall(r"engine started pid=(\d+)", self.output)]

    def worker_pids(self, index: int) -> list[int]:
        """Process ids of every worker that has had number ``index``, the newest last."""
        return [int(pid) for pid in re.findall(rf"worker-{index} started pid=(\d+)", self.output)]
