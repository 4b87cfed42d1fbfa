"""The parent of all: binds the port, starts the engine and the workers, starts again what dies, and stops in order.

It imports little, so that its forked children start at once; it has one thread and no event loop.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import resource
import select
import shutil
import signal
import socket
import tempfile
import time

from service.cpu import available_cores, share_cores
from service.engine.model_files import ModelFiles
from service.observability import metrics
from service.observability.logs import write_or_drop
from service.observability.metrics import Metrics, make_values
from service.processes.child import EXIT_UNUSABLE, MODEL_SIGNALS, STOP_SIGNAL, SUPERVISOR_SIGNALS, Child, Main, name_process
from service.processes.listener import begin_no_connection, open_listener
from service.settings import Settings
from service.web.access import ApiKeys

logger = logging.getLogger(__name__)

_GIVE_UP_AFTER = 5  # deaths of the engine in a row
_HANDSHAKE_S = 0.2  # longer than a packet takes to a load balancer and back
_ORPHANS_S = 2.0  # in which the children of a killed service end and free the port
_SAME_SIGNAL_S = 1.0  # make and systemd signal the group, and some of its members pass it on


class Supervisor:
    """Runs the service until SIGTERM or SIGINT; a second one, a second later or more, stops at once."""

    def __init__(self, settings: Settings, keys: ApiKeys) -> None:
        """``keys`` are kept up to date, for workers that start while their file cannot be read."""
        self._settings = settings
        self._keys = keys
        cores = available_cores()
        shares = share_cores(
            cores,
            workers=settings.workers,
            decode_threads=settings.decode_threads,
            cpu_threads=settings.cpu_threads,
            streams=settings.streams,
        )
        logger.info("sharing cores=%d workers=%d decode_threads=%d cpu_threads=%d streams=%d", cores, *shares)
        self._values = make_values(shares.workers)
        self._metrics = Metrics(self._values, metrics.SUPERVISOR)
        self._stop_signal: int | None = None
        self._stop_signal_at = 0.0
        self._stop_at_once = False
        mains: dict[str, Main] = {"engine": self._run_engine}
        mains |= {f"worker-{index}": functools.partial(self._run_worker, index) for index in range(shares.workers)}
        self._children = {
            row: Child(name, self._values.facts(row), main, hang_s=settings.device_timeout_s)
            for row, (name, main) in enumerate(mains.items(), metrics.ENGINE)
        }
        self._engine, *self._workers = self._children.values()
        self._model_signals: dict[int, None] = {}  # held until the engine serves; a set in order
        self._was_ready = False
        self._was_ever_ready = False

    def run(self) -> int:
        """Serve; return the exit status: 0 after a drain, 1 when it could not start or was stopped at once."""
        name_process("supervisor")
        host, port = self._settings.host, self._settings.port
        try:
            self._listener = _open_free_listener(host, port)
        except OSError as error:
            advice = "set SERVICE_PORT to another port, or to 0 for a free one; or SERVICE_HOST to another address"
            why = str(error.strerror).partition(" (while")[0]  # which repeats the address
            logger.error("cannot listen on %s:%d: %s; %s", host, port, why, advice)
            return 1
        with self._listener:
            try:
                self._engine_listener, self._engine_path = _open_engine_listener()
                self._model_files = ModelFiles()
            except OSError as error:
                logger.error("cannot use the temporary folder: %s; set TMPDIR to another", error.strerror)
                return 1
            # Every connection is a file.
            with contextlib.suppress(OSError, ValueError):
                most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            # A signal's number goes into the pipe, which ends the loop's sleep; sigtimedwait returns garbage after SIGCONT.
            self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
            for number in SUPERVISOR_SIGNALS:
                signal.signal(number, lambda number, frame: None)
            try:
                return self._serve()
            finally:
                for child in self._children.values():
                    child.kill()

    def _serve(self) -> int:
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if self._settings.tls_certificate else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        # What is imported here is shared. While the engine looks at the model: if that is of no use, no worker starts.
        importlib.import_module("service.processes.engine_process")
        self._engine.start_if_due()
        importlib.import_module("service.processes.worker")
        while self._stop_signal is None:
            self._tend(timeout_s=0.2 if self._was_ready else 0.02)
            if self._is_unusable:
                return 1
            ready = all(child.facts.ready for child in self._children.values())
            if ready and not self._was_ready:
                self._was_ever_ready = True
                write_or_drop(1, f"ready on {url}\n".encode())
            self._was_ready = ready
            if ready:
                for number in self._model_signals:
                    self._engine.signal(number)
                self._model_signals.clear()
        return self._stop(self._stop_signal)

    @property
    def _is_unusable(self) -> bool:
        """Whether the first engine has said why it cannot serve; another one would say it again."""
        return self._engine.exit_status == EXIT_UNUSABLE and not self._was_ever_ready

    def _tend(self, timeout_s: float) -> None:
        """Start what is missing, sleep until there is news or ``timeout_s`` is over, and note what has died."""
        for child in self._children.values():
            if not self._is_unusable and child.start_if_due():
                self._metrics.add(metrics.ENGINE_RESTARTS if child is self._engine else metrics.WORKER_RESTARTS)
        self._sleep(timeout_s)
        self._keys.reload()
        for row, child in self._children.items():
            child.kill_if_hung()
            if self._is_unusable or (status := child.reap()) is None:
                continue
            self._values.forget(row)
            if child is self._engine:
                self._metrics.facts.engine_gave_up = child.deaths >= _GIVE_UP_AFTER
            died = "%s died status=%s deaths_in_a_row=%d restart_in_s=%.1f"
            logger.error(died, child.name, status, child.deaths, child.restart_in_s)

    def _stop(self, number: int) -> int:
        """Not ready at once; after the grace stop accepting, answer what was accepted, end."""
        logger.info("stopping signal=%s grace_s=%.1f", signal.Signals(number).name, self._settings.shutdown_grace_s)
        self._metrics.facts.draining = True
        began = time.monotonic()
        self._tend_for(self._settings.shutdown_grace_s)
        begin_no_connection(self._listener)
        self._tend_for(_HANDSHAKE_S)  # for connections that are half made
        self._listener.close()
        if not self._end(self._workers, self._settings.drain_timeout_s + 2.0):
            why = "a second signal came" if self._stop_at_once else "workers did not stop in time"
            logger.error("stopped at once: %s", why)
            return 1
        self._end([self._engine], 5.0)
        logger.info("stopped after_s=%.1f", time.monotonic() - began)
        return 0

    def _tend_for(self, duration_s: float) -> None:
        """Go on as before for ``duration_s``, or until a second signal."""
        limit = time.monotonic() + duration_s
        while (left_s := limit - time.monotonic()) > 0 and not self._stop_at_once:
            self._tend(min(left_s, 0.2))

    def _end(self, children: list[Child], timeout_s: float) -> bool:
        """Ask processes to drain and end; return False at the time limit or at a second signal."""
        limit = time.monotonic() + timeout_s
        for child in children:
            child.signal(STOP_SIGNAL)
        while any(child.is_alive() for child in children):
            if self._stop_at_once or time.monotonic() > limit:
                return False
            self._sleep(0.2)
        return True

    def _sleep(self, timeout_s: float) -> None:
        """Sleep until a signal or the time, then act on the signals; SIGCHLD, the end of a child, only ends the sleep."""
        if not select.select([self._wake_read], [], [], timeout_s)[0]:
            return
        for number in os.read(self._wake_read, 4096):
            if number in MODEL_SIGNALS:
                self._model_signals[number] = None
            elif number != signal.SIGCHLD and self._stop_signal is None:
                self._stop_signal, self._stop_signal_at = number, time.monotonic()
            elif number != signal.SIGCHLD and time.monotonic() - self._stop_signal_at > _SAME_SIGNAL_S:
                self._stop_at_once = True

    async def _run_engine(self) -> int:
        from service.processes.engine_process import run_engine

        self._listener.close()  # a copy left open would take connections that nobody accepts any more
        return await run_engine(self._settings, self._engine_listener, self._model_files, self._values)

    async def _run_worker(self, index: int) -> int:
        from service.processes.worker import run_worker

        return await run_worker(self._settings, self._keys, index, self._listener, self._engine_path, self._values)


def _open_free_listener(host: str, port: int) -> socket.socket:
    """Listen on ``host`` and ``port``; wait for the port while the children of a killed service may still hold it."""
    limit = time.monotonic() + _ORPHANS_S
    while True:
        try:
            return open_listener(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > limit:
                raise
        time.sleep(0.05)


def _open_engine_listener() -> tuple[socket.socket, str]:
    """Return the listening Unix socket that every engine inherits, and the address at which the workers reach it.

    The file is removed at once and reached through its descriptors: it survives a cleaner of the temporary folder, a killed
    service leaves none behind, and the folder's name may be longer than a socket's address.
    """
    folder = tempfile.mkdtemp(prefix="service-")
    try:
        # Stays open: from Python 3.13 on the event loop looks for the file at the listener's address, which must stay missing.
        inside = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"/proc/self/fd/{inside}/engine")
        listener.listen(256)
        listener.setblocking(False)
        return listener, f"/proc/self/fd/{os.open(f'{folder}/engine', os.O_PATH)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
