"""The parent of all: binds the port, starts the engine and the workers, starts again what dies, and stops in order.

Owns: processes and signals. Does not know: HTTP, models. It imports little, so that its children, which are forked from
it, start at once; it has one thread and no event loop.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from service.cpu import available_cores
from service.observability.metrics import ENGINE, FIRST_WORKER, SUPERVISOR, Metrics, make_values
from service.processes.listener import begin_no_connection, open_listener
from service.processes.process_state import STOP_SIGNAL, ProcessState
from service.settings import Settings

logger = logging.getLogger(__name__)

# Forked children share what is already imported and start in milliseconds; elsewhere than on Linux, forking is not safe.
_context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

_GIVE_UP_AFTER = 5  # deaths of the engine in a row
_RESTART_DELAYS_S = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
_HANDSHAKE_S = 0.2  # longer than a packet takes to a load balancer and back
_EXIT_UNUSABLE = 3  # service.processes.engine_process.EXIT_UNUSABLE, without importing it


class Supervisor:
    """Runs the service until SIGTERM or SIGINT; a second one stops at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = ProcessState(_context, settings.workers or default_workers())
        self._values = make_values(self._state.workers, _context)
        self._metrics = Metrics(self._values, SUPERVISOR)
        self._signals: list[int] = []
        self._engine: BaseProcess | None = None
        self._engine_deaths = 0
        self._engine_restart_at = 0.0
        self._workers: list[BaseProcess | None] = [None] * self._state.workers
        self._worker_restart_at = [0.0] * self._state.workers
        self._worker_deaths = [0] * self._state.workers
        self._worker_started: set[int] = set()
        self._admin: BaseProcess | None = None
        self._admin_listener: socket.socket | None = None
        self._admin_restart_at = 0.0
        self._engine_beats = 0
        self._engine_silence_s = 0.0
        self._looked_at_engine = time.monotonic()
        self._was_ready = False
        self._was_ever_ready = False

    def run(self) -> int:
        """Serve; give the exit status: 0 after a drain, 1 when it could not start or was stopped at once."""
        settings = self._settings
        host, port = settings.host, settings.port
        with contextlib.ExitStack() as sockets:
            try:
                self._listener = sockets.enter_context(open_listener(host, port))
                if settings.admin_listen:
                    host, port = "127.0.0.1", settings.admin_listen
                    self._admin_listener = sockets.enter_context(open_listener(host, port))
            except OSError as error:
                logger.error("cannot listen on %s:%d: %s; choose another host or port", host, port, error.strerror)
                return 1
            return self._run()

    def _run(self) -> int:
        _allow_many_files()
        # The pipe wakes the loop for a signal and for a child that has something new in the shared state.
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        for number in (signal.SIGHUP, signal.SIGUSR1):  # look at the checkpoint file now; go back to the model before
            signal.signal(number, self._pass_on)
        with tempfile.TemporaryDirectory(prefix="service-") as folder:
            self._socket_path = str(Path(folder) / "engine.sock")
            try:
                return self._serve()
            finally:
                self._kill_all()

    def _serve(self) -> int:
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if self._settings.tls_certificate else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        while not self._signals:
            if self._tend(timeout_s=0.2) == _EXIT_UNUSABLE and not self._was_ever_ready:
                return 1  # it has said why, and would say it again
            ready = self._engine is not None and self._state.all_workers_ready
            if ready and not self._was_ready:
                self._engine_deaths = 0
                self._state.engine_gave_up = False
                self._was_ever_ready = True
                print(f"ready on {url}", flush=True)  # noqa: T201  # scripts wait for this line
            self._was_ready = ready
        return self._stop()

    def _tend(self, timeout_s: float) -> int | None:
        """Start what is missing, sleep until there is news or ``timeout_s`` is over, and give a dead engine's exit status."""
        now = time.monotonic()
        if self._engine is None and now >= self._engine_restart_at:
            self._start_engine()
        for index, worker in enumerate(self._workers):
            if worker is None and now >= self._worker_restart_at[index]:
                self._start_worker(index)
        if self._admin_listener is not None and self._admin is None and now >= self._admin_restart_at:
            self._start_admin(self._admin_listener)
        self._wait(timeout_s)
        self._reap_workers()
        self._reap_admin()
        self._kill_silent_engine()
        return self._reap_engine()

    def _stop(self) -> int:
        """Not ready at once; after the grace stop accepting, answer what was accepted, end."""
        logger.info("stopping signal=%s grace_s=%.1f", signal.Signals(self._signals[0]).name, self._settings.shutdown_grace_s)
        self._state.draining = True
        began = time.monotonic()
        self._tend_for(self._settings.shutdown_grace_s)
        begin_no_connection(self._listener)
        self._tend_for(_HANDSHAKE_S)  # for connections that are half made
        self._listener.close()
        for worker in self._workers:
            if worker is not None:
                _ask_to_stop(worker)
        limit = time.monotonic() + self._settings.drain_timeout_s + 2.0
        if not self._join([worker for worker in self._workers if worker is not None], limit):
            why = "a second signal came" if len(self._signals) > 1 else "workers did not stop in time"
            logger.error("stopped at once: %s", why)
            return 1
        if self._engine is not None:
            _ask_to_stop(self._engine)
            self._join([self._engine], time.monotonic() + 5.0)
        logger.info("stopped after_s=%.1f", time.monotonic() - began)
        return 0

    def _tend_for(self, duration_s: float) -> None:
        """Go on as before for ``duration_s``, or until a second signal."""
        limit = time.monotonic() + duration_s
        while (left_s := limit - time.monotonic()) > 0 and len(self._signals) < 2:
            self._tend(min(left_s, 0.2))

    def _join(self, processes: list[BaseProcess], limit: float) -> bool:
        """Wait for processes to end; give False at ``limit`` or at a second signal."""
        while any(process.is_alive() for process in processes):
            if len(self._signals) > 1 or time.monotonic() > limit:
                return False
            self._wait(timeout_s=0.2, processes=processes)
        return True

    def _start_engine(self) -> None:
        from service.processes.engine_process import run_engine

        if self._state.engine_starts:
            self._metrics.engine_restarted()
        self._state.engine_starts += 1
        # A copy of the listener left open there would take connections that nobody accepts any more.
        arguments = (
            [self._listener, self._admin_listener],
            run_engine,
            self._settings,
            self._socket_path,
            self._state,
            self._values,
        )
        self._engine = _context.Process(target=_child, args=arguments, name="engine")
        self._engine.start()
        self._engine_silence_s = 0.0
        print(f"engine started pid={self._engine.pid}", flush=True)  # noqa: T201  # scripts wait for this line

    def _start_worker(self, index: int) -> None:
        from service.processes.worker import WorkerPlace, run_worker

        place = WorkerPlace(index, self._listener, self._socket_path, self._state, self._values, self._wake_write)
        arguments = ([self._admin_listener], run_worker, self._settings, place)
        worker = _context.Process(target=_child, args=arguments, name=f"worker-{index}")
        worker.start()
        if index in self._worker_started:
            self._metrics.worker_restarted()
        self._worker_started.add(index)
        self._workers[index] = worker
        logger.info("worker started index=%d pid=%d", index, worker.pid)

    def _start_admin(self, listener: socket.socket) -> None:
        from service.processes.admin import run_admin

        self._admin = _context.Process(
            target=_child, args=([self._listener], run_admin, self._settings, listener), name="admin"
        )
        self._admin.start()
        logger.info("admin started pid=%d port=%d", self._admin.pid, self._settings.admin_listen)

    def _reap_admin(self) -> None:
        if self._admin is not None and not self._admin.is_alive():
            logger.error("admin died status=%s", self._admin.exitcode)
            self._admin.close()
            self._admin = None
            self._admin_restart_at = time.monotonic() + _RESTART_DELAYS_S[-1]

    def _reap_engine(self) -> int | None:
        """Note the engine's death and when to start the next; give its exit status."""
        if self._engine is None or self._engine.is_alive():
            return None
        status = self._engine.exitcode
        if status == _EXIT_UNUSABLE and not self._was_ever_ready:
            return status
        self._engine_deaths += 1
        delay_s = _RESTART_DELAYS_S[min(self._engine_deaths - 1, len(_RESTART_DELAYS_S) - 1)]
        self._engine.close()
        self._engine = None
        for index in range(self._state.workers):
            self._state.set_worker_ready(index, False)  # they will find out by themselves, but perhaps after the next start
        self._metrics.process_ended(ENGINE)
        self._engine_restart_at = time.monotonic() + delay_s
        self._state.engine_gave_up = self._engine_deaths >= _GIVE_UP_AFTER
        logger.error("engine died status=%s deaths_in_a_row=%d restart_in_s=%.1f", status, self._engine_deaths, delay_s)
        return status

    def _kill_silent_engine(self) -> None:
        """End an engine whose event loop has stood still for ``device_timeout_s``; the workers wait for it in vain.

        A pause of this process counts for a second at most: what stopped both, a suspended machine, was not the engine.
        """
        now, beats = time.monotonic(), self._state.engine_beats
        self._engine_silence_s = (
            0.0 if beats != self._engine_beats else self._engine_silence_s + min(now - self._looked_at_engine, 1.0)
        )
        self._engine_beats, self._looked_at_engine = beats, now
        if self._engine is not None and self._engine_silence_s > self._settings.device_timeout_s:
            logger.error("engine hangs: no sign of life for %.1f s", self._engine_silence_s)
            self._engine.kill()
            self._engine_silence_s = 0.0

    def _reap_workers(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker is None or worker.is_alive():
                continue
            self._worker_deaths[index] += 1
            delay_s = _RESTART_DELAYS_S[min(self._worker_deaths[index] - 1, len(_RESTART_DELAYS_S) - 1)]
            logger.error("worker died index=%d status=%s restart_in_s=%.1f", index, worker.exitcode, delay_s)
            worker.close()
            self._workers[index] = None
            self._metrics.process_ended(FIRST_WORKER + index)
            self._worker_restart_at[index] = time.monotonic() + delay_s
            self._state.set_worker_ready(index, False)
        if self._state.all_workers_ready:
            self._worker_deaths = [0] * self._state.workers

    def _wait(self, timeout_s: float, processes: list[BaseProcess] | None = None) -> None:
        """Sleep until a signal, news from a child, a child's end, or the time."""
        watched = [self._engine, self._admin, *self._workers] if processes is None else processes
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for process in watched:
                if process is not None and process.is_alive():
                    selector.register(process.sentinel, selectors.EVENT_READ)
            selector.select(timeout_s)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._engine is not None and self._engine.pid is not None:
            os.kill(self._engine.pid, number)

    def _kill_all(self) -> None:
        for process in (self._engine, self._admin, *self._workers):
            if process is not None and process.is_alive():
                process.kill()
                process.join()


def default_workers() -> int:
    """Give the HTTP workers for the cores at hand: all but one, which the engine keeps busy; at least 1."""
    return max(1, available_cores() - 1)


def _ask_to_stop(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, STOP_SIGNAL)


def _allow_many_files() -> None:
    """Lift the soft limit of open files to the hard one: every connection is a file."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _child(foreign: list[socket.socket | None], target: Callable[..., int], *arguments: object) -> None:
    """Run a child's main function without the supervisor's signal handling and the ``foreign`` sockets."""
    for listener in foreign:
        if listener is not None:
            listener.close()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Many senders signal the whole group (Ctrl-C, timeout, systemd): when to stop is the supervisor's to say.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(STOP_SIGNAL, signal.SIG_DFL)
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(target(*arguments))
