"""A server as a child process in a group of its own: started, waited for until it is ready, and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

_PATIENCE_S = 60.0  # no expectation of speed: only the end of a wait that would never end
_STOP_PATIENCE_S = 10.0


class ServerProcess:
    """A command that is ready when the ``with`` block begins, and gone with all its children when it ends.

    It is ready when ``probe``, a path of ``url``, answers with any status below 500; without a ``url``, when its output
    says ``ready on URL``. ``ready_s`` is how long that took. The command runs in ``folder``, without the caller's own
    ``SERVICE_`` variables. With ``until_ready`` false the block begins at once.
    """

    def __init__(
        self,
        command: list[str],
        *,
        environment: dict[str, str],
        folder: Path | None = None,
        url: str = "",
        probe: str = "/",
        until_ready: bool = True,
    ) -> None:
        self.url = url
        self.ready_s = 0.0
        self._command = command
        self._environment = environment
        self._folder = folder
        self._probe = url + probe if url else ""
        self._until_ready = until_ready
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, name="server-output", daemon=True)
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        """Start it, and wait until it is ready."""
        began = time.monotonic()
        try:
            self.start()
            if self._until_ready:
                self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop it, and show its output after an error."""
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
            self._started.wait(_STOP_PATIENCE_S)
        self.kill()
        self._show_output(raised[1])

    def start(self) -> None:
        """Start it without waiting for anything."""
        assert self._process is None, "it was started already"
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("SERVICE_")}
        self._process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            env={**inherited, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # one process group, so that no child can outlive its user
        )
        self._reader.start()

    def wait_until_ready(self, times: int = 1) -> str:
        """Wait until it is ready, or has said so that many ``times`` since its start; return its address.

        Raises AssertionError as ``wait_for_output`` does.
        """
        if not self._probe:
            self.url = self.wait_for_output(r"ready on (https?://\S+)", times).group(1)
            return self.url
        limit = time.monotonic() + _PATIENCE_S
        while not _responds(self._probe):
            assert not self._ended, f"the server ended before it was ready:\n{self.output}"
            assert time.monotonic() < limit, f"the server did not get ready:\n{self.output}"
            time.sleep(0.01)
        return self.url

    def wait_for_output(self, pattern: str, times: int = 1) -> re.Match[str]:
        """Wait until ``pattern`` has been in that many lines since the start, and return the last of these matches.

        Raises AssertionError with the output when the service ends first, or after a minute.
        """
        limit = time.monotonic() + _PATIENCE_S
        with self._news:
            while True:
                matches = [match for line in self._lines if (match := re.search(pattern, line))]
                if len(matches) >= times:
                    return matches[times - 1]
                if self._ended or not self._news.wait(limit - time.monotonic()):
                    why = "ended" if self._ended else "went on"
                    raise AssertionError(f"the server {why} without saying {pattern!r} {times} times:\n" + "".join(self._lines))

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started, as an operator does."""
        self._started.send_signal(number)

    def close_output(self, *, unread: bool = False) -> None:
        """Close the pipe that it writes to, or leave it open, and read no more."""
        output = self._started.stdout
        assert output is not None, "it is a pipe"
        if unread:
            os.dup(output.fileno())
        os.dup2(os.open(os.devnull, os.O_RDONLY), output.fileno())

    def wait(self) -> int:
        """Wait until it and all its children have ended; return its exit status."""
        status = self._started.wait(_PATIENCE_S)
        self._reader.join(_PATIENCE_S)  # the output ends when the last process that could write to it has
        assert not self._reader.is_alive(), "a child outlives its parent"
        return status

    def stop(self) -> int:
        """Send SIGTERM and wait for the end; return the exit status."""
        self.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End every process of it at once; harmless when it has ended, or never started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(_PATIENCE_S)
        self._reader.join(_PATIENCE_S)

    @property
    def output(self) -> str:
        """What it has written so far, standard output and standard error together."""
        with self._news:
            return "".join(self._lines)

    @property
    def pid(self) -> int:
        """Id of the process that was started, and of its group."""
        return self._started.pid

    @property
    def _started(self) -> subprocess.Popen[str]:
        assert self._process is not None, "it was not started"
        return self._process

    def _show_output(self, error: BaseException | None) -> None:
        if error is not None:
            sys.stderr.write(f"--- output of the server ---\n{self.output}")

    def _read(self) -> None:
        output = self._started.stdout
        assert output is not None, "it is a pipe"
        with output:
            for line in output:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process by SystemExit, so that every ``with`` block ends its server."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
