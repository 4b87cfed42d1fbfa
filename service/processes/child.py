"""A child process of the supervisor: started, watched, and started again after it has died."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import uvloop

from service.observability.shared_values import Facts

logger = logging.getLogger(__name__)

Main = Callable[[], Coroutine[Any, Any, int]]
"""Main function of a process, run on its event loop; returns the exit status."""

STOP_SIGNAL = signal.SIGUSR2  # from the supervisor to its children: answer what was accepted, then end
# To the supervisor, which sends it on to the engine: check the checkpoint file; check it, whatever was rejected before; go back
# to the model before.
MODEL_SIGNALS = {signal.SIGHUP: "check", signal.SIGRTMIN: "reload", signal.SIGUSR1: "rollback"}
SUPERVISOR_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, *MODEL_SIGNALS}
EXIT_UNUSABLE = 3  # the checkpoint or the runtime cannot be used: starting again would not help

HEARTBEAT_S = 0.25
_RESTART_DELAYS_S = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
_SOUND_LIFE_S = 60.0  # after which a death is the first again
_PAUSE_S = 1.0  # between two checks, which come several times a second
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # sys/prctl.h
_M_ARENA_MAX = -8  # malloc.h

_context = multiprocessing.get_context("fork")  # what is imported is shared, so a child starts in milliseconds


class Child:
    """The process in one place; ``facts`` are what it says of itself, ``deaths`` counts those in a row."""

    def __init__(self, name: str, facts: Facts, main: Main, *, hang_s: float) -> None:
        """Start nothing yet. The process is killed when its heartbeats stop for ``hang_s`` seconds."""
        self.name = name
        self.facts = facts
        self.deaths = 0
        self.restart_in_s = 0.0  # as counted from its last death
        self._main = main
        self._hang_s = hang_s
        self._process: ForkProcess | None = None
        self._started = self._due = self._checked = time.monotonic()

    def start_if_due(self) -> bool:
        """Start the process if none runs and its restart delay is over; return whether it was a restart."""
        now = time.monotonic()
        if self._process is not None or now < self._due:
            return False
        self._started = self._checked = self.facts.beat_at = now
        self._process = _context.Process(target=_run, args=(self.name, self.facts, self._main), name=self.name)
        self._process.start()
        logger.info("%s started pid=%d", self.name, self._process.pid)
        return self.deaths > 0

    @property
    def exit_status(self) -> int | None:
        """The exit status of a process that has ended and was not reaped."""
        return None if self._process is None else self._process.exitcode

    def reap(self) -> int | None:
        """Return the exit status if the process has ended since the last call; the next one is then scheduled."""
        status = self.exit_status
        if self._process is not None and status is not None:
            self._process.close()
            self._process = None
            now = time.monotonic()
            self.deaths = 1 if now - self._started > _SOUND_LIFE_S else self.deaths + 1
            self.restart_in_s = _RESTART_DELAYS_S[min(self.deaths, len(_RESTART_DELAYS_S)) - 1]
            self._due = now + self.restart_in_s
        return status

    def kill_if_hung(self) -> None:
        """Kill a process without heartbeats.

        After a pause of this process the watch begins anew: what stopped both, a suspended machine, was not the child.
        """
        now = time.monotonic()
        if now - self._checked > _PAUSE_S:
            self.facts.beat_at = now
        self._checked = now
        silent_s = now - self.facts.beat_at
        if self._process is not None and silent_s > self._hang_s:
            logger.error("%s hangs: no heartbeat for %.1f s", self.name, silent_s)
            self._process.kill()
            self.facts.beat_at = now

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self._process is not None and self.exit_status is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _run(name: str, facts: Facts, main: Main) -> None:
    """Run a child's main function; it ends with the supervisor, and the supervisor alone says when to stop."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _share_one_heap()
    name_process(name)
    _set_command_line(f"service {name}")
    parent = multiprocessing.parent_process()
    assert parent is not None, "a child has a parent"
    if os.getppid() != parent.pid:  # it died before the line above
        sys.exit(1)
    signal.set_wakeup_fd(-1)
    # Many senders signal the whole group: Ctrl-C, timeout, systemd.
    for number in SUPERVISOR_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(show_life(facts, main())))


def name_process(name: str) -> None:
    """Set the name that ``ps`` and the logs show."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
    multiprocessing.current_process().name = name


def _set_command_line(title: str) -> None:
    """Write over what ``ps -f`` shows of the arguments, which a child has from the supervisor."""
    with contextlib.suppress(OSError, ValueError):
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])  # proc(5)
        ctypes.memmove(start, title.encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)


def _share_one_heap() -> None:
    """Have all threads allocate from one heap of glibc: what one of them frees is then used again by another."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_memory() -> None:
    """Return to the system what was freed; glibc keeps most of it otherwise."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def change_model(action: str) -> None:
    """Ask the supervisor to ``reload`` or ``rollback``."""
    os.kill(os.getppid(), next(number for number, name in MODEL_SIGNALS.items() if name == action))


async def show_life(facts: Facts, main: Coroutine[Any, Any, int]) -> int:
    """Return what ``main`` returns, and show in ``facts`` meanwhile that the event loop runs."""

    async def beat() -> None:
        while True:
            facts.beat_at = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)

    beating = asyncio.create_task(beat())
    try:
        return await main
    finally:
        beating.cancel()
