"""A server under test as a group of processes: started, waited for, its processor time and memory read, ended.

Owns: that nothing of it is left behind. Does not know: which server it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import httpx

_PATIENCE_S = 120.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ServerGroup:
    """A command in a process group of its own, from ready to gone.

    It is ready when ``probe``, a path on ``port``, answers anything below 500; where ``port`` is 0, the output says
    ``ready on URL``. ``ready_s`` is how long that took. The command runs in ``folder``, or where this process does. While it
    runs, SIGTERM and SIGHUP end this process as an exception does, so that the server goes with it; on the main thread only.
    """

    def __init__(
        self,
        command: list[str],
        *,
        port: int = 0,
        probe: str = "/",
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._command = command
        self._port = port
        self._probe = probe
        self._environment = environment or {}
        self._folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self.ready_s = 0.0

    def __enter__(self) -> Self:
        """Start it and wait until it is ready."""
        started = time.monotonic()
        self._handlers = exit_on_signals()
        self._output = tempfile.TemporaryFile("w+")  # closed in __exit__
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, **self._environment},
            cwd=self._folder,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not self._is_ready():
                if self._process.poll() is not None or time.monotonic() > started + _PATIENCE_S:
                    raise RuntimeError(f"{' '.join(self._command)} did not get ready:\n{self._said()}")
                time.sleep(0.01)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.ready_s = time.monotonic() - started
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Ask it to stop, and end what does not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._output.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def cpu_s(self) -> float:
        """Give the processor time of the whole group so far, in seconds."""
        return sum(sum(map(int, fields[11:13])) for fields in self._members()) / _TICKS_PER_S

    def thread_cpu_s(self) -> dict[tuple[int, int], float]:
        """Give the processor time so far of every thread of the group in seconds, by process and thread id."""
        times = {}
        for pid in [fields[-1] for fields in self._members()]:
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    times[int(pid), int(path.parent.name)] = int(path.read_text().split()[0]) / 1e9
        return times

    def resident_mb(self) -> float:
        """Give the memory of the whole group in megabytes, pages that several share counted once."""
        total = 0
        for pid in [fields[-1] for fields in self._members()]:
            with contextlib.suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[0])
        return total / 1000

    def _is_ready(self) -> bool:
        if not self._port:
            found = re.search(r"ready on (\S+)", self._said())
            if found:
                self.url = found[1]
            return found is not None
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + self._probe, timeout=5).status_code < 500
        return False

    def _said(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def _members(self) -> list[list[str]]:
        """The fields of /proc/PID/stat from the third on, and the pid, for every process of the group."""
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(") ")[2].split()
                if int(fields[2]) == self._process.pid:
                    members.append([*fields, path.parent.name])
        return members


def exit_on_signals() -> dict[signal.Signals, Any]:
    """Let SIGTERM and SIGHUP end this process by SystemExit, past every ``finally``; give the handlers they had."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    return {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
