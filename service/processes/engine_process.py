"""The engine process: it alone owns the device and the weights, and serves the workers' connections.

A device that hangs, or fails known images too, ends this process, and the supervisor starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial

from service.engine.device_stream import LoadedModel
from service.engine.local_engine import LocalEngine
from service.engine.model_files import ModelFiles
from service.engine.model_store import ModelRefused, ModelStore
from service.observability.metrics import ENGINE, MODEL_RELOADS, Metrics
from service.observability.shared_values import SharedValues
from service.processes import wire
from service.processes.child import EXIT_UNUSABLE, HEARTBEAT_S, MODEL_SIGNALS, STOP_SIGNAL, return_memory
from service.runtime.open_runner import has_cuda, measure_device
from service.settings import Settings

logger = logging.getLogger(__name__)

EXIT_DEVICE = 4  # the device hangs or fails every batch: a new process may

IDLE_CHECK_S = 5.0  # an idle device answers a known image this often, so that its death shows before a client meets it
_DEVICE_USAGE_S = 1.0
_CHECKPOINT_CHECK_S = 1.0
# Where the model shares the cores with the workers: they decode first, and the device finds fuller batches.
_BELOW_WORKERS = 5


def make_engine(
    settings: Settings, model: LoadedModel, metrics: Metrics, on_change: Callable[[], None] = lambda: None
) -> LocalEngine:
    """Start an engine for ``model`` on the running loop, with the limits of ``settings``; it reports to ``metrics``."""
    return LocalEngine(
        model,
        max_queue_images=settings.max_queue_images,
        queue_delay_ms=settings.queue_delay_ms,
        load=metrics.facts,
        on_batch=metrics.observe_batch,
        on_change=on_change,
    )


class EngineServer:
    """Serves any number of workers until ``stop``; those that connect while the model is loaded wait for the status."""

    def __init__(self, settings: Settings, metrics: Metrics, store: ModelStore) -> None:
        """Serve the models of ``store``; heartbeats and the load are reported in the facts of ``metrics``."""
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._stopping = asyncio.Event()
        self._connections: set[wire.WorkerConnection] = set()
        self.engine: LocalEngine

    async def run(self, listener: socket.socket) -> int:
        """Load the model, then serve on a listening Unix socket; return the exit status."""
        loop = asyncio.get_running_loop()
        try:
            opening = loop.run_in_executor(None, self._store.open)
            self.engine = engine = make_engine(self._settings, await opening, self._metrics, self.announce)
            del opening  # what is replaced next is not kept
        except Exception as error:  # of any runtime; a second try would end the same
            logger.error("cannot serve this model: %s", error or type(error).__name__)
            return EXIT_UNUSABLE
        engine.report(self._store.refusal)
        server = await loop.create_unix_server(lambda: wire.WorkerConnection(engine, self._connections), sock=listener)
        self._metrics.facts.ready = True
        watching = (self._watch_device(engine.status().device), self._follow_checkpoint(engine))
        tasks = [loop.create_task(each) for each in watching]
        gc.collect()
        gc.freeze()  # what is loaded stays; collections need not visit it again
        loop.add_signal_handler(STOP_SIGNAL, self.stop)
        try:
            return await self._serve(engine)
        finally:
            for task in tasks:
                task.cancel()
            server.close()
            for connection in list(self._connections):
                connection.close()
            engine.close()

    def stop(self) -> None:
        """Let ``run`` end; the workers have ended before, so nobody waits for an answer."""
        self._stopping.set()

    async def _serve(self, engine: LocalEngine) -> int:
        """Watch the device until ``stop``."""
        while not self._stopping.is_set():
            engine.check_if_idle(IDLE_CHECK_S)
            if engine.longest_running_s > self._settings.device_timeout_s:
                logger.error("device hangs: a batch has run for %.1f s", engine.longest_running_s)
                os._exit(EXIT_DEVICE)  # its thread cannot be stopped any other way
            if engine.state == "failed":
                return EXIT_DEVICE
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), HEARTBEAT_S)
        return 0

    async def _follow_checkpoint(self, engine: LocalEngine) -> None:
        """Serve what the checkpoint file becomes, if it proves itself, and do what MODEL_SIGNALS ask for.

        They are sent only to an engine that serves.
        """
        loop = asyncio.get_running_loop()
        asked: asyncio.Queue[str] = asyncio.Queue()
        for number, name in MODEL_SIGNALS.items():
            loop.add_signal_handler(number, asked.put_nowait, name)
        while True:
            try:
                action = await asyncio.wait_for(asked.get(), _CHECKPOINT_CHECK_S)
            except TimeoutError:
                if not self._store.has_new_file():
                    continue
                action = "check"
            new, outcome = None, "loaded"
            change: Callable[[], LoadedModel | None] = partial(self._store.check, despite_rejection=action == "reload")
            if action == "rollback":
                change, outcome = self._store.rollback, "rolled_back"
            try:
                new = await loop.run_in_executor(None, change)
            except ModelRefused as error:
                logger.error("model refused: %s", error)
                self._metrics.add(MODEL_RELOADS, "refused")
            if new is not None:
                self._metrics.add(MODEL_RELOADS, outcome)
                engine.swap(new)
                logger.info("model replaced outcome=%s new=%s", outcome, new.info.version)
                new = None  # what is replaced next is not kept
            engine.report(self._store.refusal)
            gc.collect()
            await loop.run_in_executor(None, return_memory)

    async def _watch_device(self, device: str) -> None:
        """Measure the GPU once a second; on a thread, because the driver takes its time under load."""
        facts = self._metrics.facts
        while device.startswith("cuda"):
            measured = await asyncio.to_thread(measure_device, device)
            facts.device_used_bytes, facts.device_total_bytes, facts.device_utilization = measured
            await asyncio.sleep(_DEVICE_USAGE_S)

    def announce(self) -> None:
        """Send the status to every worker, before any result of a model that it names."""
        frame = wire.pack_status(self.engine.status())
        for connection in self._connections:
            connection.send(frame)


async def run_engine(settings: Settings, listener: socket.socket, files: ModelFiles, values: SharedValues) -> int:
    """Serve the workers until STOP_SIGNAL; return the exit status."""
    started = time.monotonic()
    if settings.device == "cpu" or not has_cuda():
        os.nice(_BELOW_WORKERS)  # now: threads take over what the thread has that makes them
    status = await EngineServer(settings, Metrics(values, ENGINE), ModelStore(settings, files)).run(listener)
    if status != EXIT_UNUSABLE:  # the reason is the last that is said
        logger.info("engine stopped status=%d uptime_s=%.1f", status, time.monotonic() - started)
    return status
