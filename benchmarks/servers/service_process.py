"""The real service as a child process: ``python -m service`` on a free port.

Owns: starting it, its output, its processes' ids, and that nothing of it is left behind. Does not know: what is asked of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_ROOT = Path(__file__).parents[2]
_PATIENCE_S = 120.0  # no expectation of speed: only the end of a test that would hang


class ServiceProcess:
    """A service that is ready when the ``with`` block begins, and gone with all its children when it ends.

    >>> with ServiceProcess(checkpoint_path, workers=2, max_batch_size=8) as service:
    ...     httpx.get(service.url + "/health")

    Any setting can be given by its name; no setting comes from the caller's own environment. Without other word the
    service takes a free port and stops without a grace period. With ``until_ready`` false the block begins at once.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        until_ready: bool = True,
        environment: dict[str, str] | None = None,
        **settings: object,
    ) -> None:
        self.url = ""
        self._until_ready = until_ready
        self._settings = {"port": 0, "shutdown_grace_s": 0, "checkpoint": checkpoint, **settings}
        self._environment = environment or {}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        """Start it, and wait until it is ready."""
        try:
            self.start()
            if self._until_ready:
                self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Kill what is left of it; show what it said when the test failed."""
        self.kill()
        if error is not None:
            sys.stderr.write(f"--- the service said ---\n{self.output}")

    def start(self) -> None:
        """Start it without waiting for anything."""
        assert self._process is None, "it was started already"
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("SERVICE_")}
        settings = {f"SERVICE_{name.upper()}": str(value) for name, value in self._settings.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=_ROOT,
            env={**inherited, **settings, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # one process group, so that no child can outlive the test
        )
        self._reader = threading.Thread(target=self._read, name="service-output", daemon=True)
        self._reader.start()

    def wait_until_ready(self, times: int = 1) -> str:
        """Wait until it has said ``ready on`` that many ``times`` since its start; give its address."""
        self.url = self.wait_for_output(r"ready on (https?://\S+)", times).group(1)
        return self.url

    def wait_for_output(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until ``pattern`` has been in that many lines since the start, and give the last of these matches.

        Raises AssertionError with the output when the service ends first, or after two minutes.
        """
        limit = time.monotonic() + _PATIENCE_S
        with self._news:
            while True:
                matches = [match for line in self._lines if (match := re.search(pattern, line))]
                if len(matches) >= times:
                    return matches[times - 1]
                if self._ended or not self._news.wait(limit - time.monotonic()):
                    why = "ended" if self._ended else "went on"
                    raise AssertionError(
                        f"the service {why} without saying {pattern!r} {times} times:\n" + "".join(self._lines)
                    )

    def connect(self) -> socket.socket:
        """Open a connection to the service, for what no HTTP client would send."""
        address = urlsplit(self.url)
        assert address.hostname is not None, "the service prints its host"
        assert address.port is not None, "and its port"
        return socket.create_connection((address.hostname, address.port), timeout=60)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor, as an operator does."""
        assert self._process is not None, "it was not started"
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait until the supervisor and all its children have ended; give the supervisor's exit status."""
        assert self._process is not None, "it was not started"
        status = self._process.wait(_PATIENCE_S)
        assert self._reader is not None, "started with the process"
        self._reader.join(_PATIENCE_S)  # the output ends when the last process that could write to it has
        assert not self._reader.is_alive(), "a child outlives the supervisor"
        return status

    def stop(self) -> int:
        """Send SIGTERM and wait for the end; give the exit status."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End every process of it at once; harmless when it has ended, or never started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._reader is not None, "started with the process"
        self._reader.join()
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdout.close()

    @property
    def output(self) -> str:
        """What it has written so far, standard output and standard error together."""
        with self._news:
            return "".join(self._lines)

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        assert self._process is not None, "it was not started"
        return self._process.pid

    @property
    def engine_pids(self) -> list[int]:
        """The process ids of every engine since the start, the newest last."""
        return [int(pid) for pid in re.findall(r"engine started pid=(\d+)", self.output)]

    def worker_pids(self, index: int) -> list[int]:
        """The process ids of every worker that has had number ``index``, the newest last."""
        return [int(pid) for pid in re.findall(rf"worker started index={index} pid=(\d+)", self.output)]

    def _read(self) -> None:
        assert self._process is not None, "started before its reader"
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()
