"""The engine process: it alone owns the device and the weights, and serves the workers' connections.

A device that hangs, or fails known images too, ends this process, and the supervisor starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import EngineStatus, Finish, ModelInfo, Outcome, Request
from service.engine.local_engine import LoadedModel, LocalEngine
from service.engine.model_files import ModelFiles
from service.engine.model_store import ModelRefused, ModelStore
from service.errors import ServiceError
from service.observability.metrics import ENGINE, MODEL_RELOADS, Metrics
from service.observability.shared_values import SharedValues
from service.processes import wire
from service.processes.child import EXIT_UNUSABLE, HEARTBEAT_S, MODEL_SIGNALS, STOP_SIGNAL, beat, open_event_loop
from service.runtime.device_usage import device_is_measured, measure_device
from service.settings import Settings

logger = logging.getLogger(__name__)

EXIT_DEVICE = 4  # the device hangs or fails every batch: a new process may

IDLE_CHECK_S = 5.0  # an idle device answers a known image this often, so that its death shows before a client meets it
_DEVICE_USAGE_S = 1.0
_CHECKPOINT_CHECK_S = 1.0


def make_engine(settings: Settings, model: LoadedModel, metrics: Metrics) -> LocalEngine:
    """Start an engine for ``model`` on the running loop, with the limits of ``settings``; it reports to ``metrics``."""

    def note_full(retry_after_s: int) -> None:
        metrics.facts.queue_full_for_s = retry_after_s

    return LocalEngine(
        model,
        max_queue_images=settings.max_queue_images,
        queue_delay_ms=settings.queue_delay_ms,
        on_batch=metrics.observe_batch,
        on_full=note_full,
    )


class EngineServer:
    """Serves any number of workers, from before the model is loaded until ``stop``."""

    def __init__(self, settings: Settings, metrics: Metrics, store: ModelStore, *, idle_check_s: float = IDLE_CHECK_S) -> None:
        """Serve the models of ``store``; heartbeats and a full queue are reported in the facts of ``metrics``."""
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._idle_check_s = idle_check_s
        self._stopping = asyncio.Event()
        self._connections: set[_WorkerConnection] = set()
        self.engine: LocalEngine | None = None
        self.models: list[ModelInfo] = []

    async def run(self, listener: socket.socket) -> int:
        """Serve on a listening Unix socket; return the exit status."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _WorkerConnection(self), sock=listener)
        tasks = [loop.create_task(beat(self._metrics.facts)), loop.create_task(self._report())]
        try:
            try:
                model = await loop.run_in_executor(None, self._store.open)
                self.engine = make_engine(self._settings, model, self._metrics)
            except Exception as error:  # of any runtime; a second try would end the same
                logger.error("cannot serve this model: %s", error or type(error).__name__)
                return EXIT_UNUSABLE
            self.announce(model.info)
            tasks.append(loop.create_task(self._watch_device(model.runner.device)))
            tasks.append(loop.create_task(self._follow_checkpoint(self.engine, model)))
            del model  # what is replaced next is not kept
            gc.collect()
            gc.freeze()  # what is loaded stays; collections need not visit it again
            loop.add_signal_handler(STOP_SIGNAL, self.stop)  # until here nothing was accepted, and the signal just ends it
            return await self._serve(self.engine)
        finally:
            for task in tasks:
                task.cancel()
            server.close()
            for connection in list(self._connections):
                connection.close()
            if self.engine is not None:
                self.engine.close()

    def stop(self) -> None:
        """Answer what was accepted, then let ``run`` end."""
        self._stopping.set()

    async def _serve(self, engine: LocalEngine) -> int:
        """Watch the device until ``stop``, then drain."""
        self._report_status()
        while not self._stopping.is_set():
            engine.check_if_idle(self._idle_check_s)
            if engine.longest_running_s > self._settings.device_timeout_s:
                logger.error("device hangs: a batch has run for %.1f s", engine.longest_running_s)
                os._exit(EXIT_DEVICE)  # its thread cannot be stopped any other way
            if engine.status().state == "failed":
                return EXIT_DEVICE
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), HEARTBEAT_S)
        await engine.drain(self._settings.drain_timeout_s)
        return 0

    async def _report(self) -> None:
        """Send the status to the workers, to which it is the engine's heartbeat, from before the model is loaded."""
        while True:
            self._report_status()
            await asyncio.sleep(HEARTBEAT_S)

    async def _follow_checkpoint(self, engine: LocalEngine, model: LoadedModel) -> None:
        """Serve what the checkpoint file becomes, if it proves itself, and do what MODEL_SIGNALS ask for."""
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
            load: Callable[[LoadedModel], LoadedModel | None] = partial(
                self._store.load_new, despite_rejection=action == "reload"
            )
            if action == "rollback":
                load = self._store.load_previous
            outcome = "rolled_back" if action == "rollback" else "loaded"
            try:
                new = await loop.run_in_executor(None, load, model)
            except ModelRefused as error:
                logger.error("model refused: %s", error)
                outcome = "refused"
            else:
                if new is None:
                    continue
                engine.swap(new)
                self.announce(new.info)
                logger.info("model replaced outcome=%s old=%s new=%s", outcome, model.info.version, new.info.version)
                model = new
                del new  # what is replaced next is not kept
            self._metrics.add(MODEL_RELOADS, outcome)
            self._report_status()
            await loop.run_in_executor(None, _return_memory)

    async def _watch_device(self, device: str) -> None:
        """Measure the GPU once a second; on a thread, because the driver takes its time under load."""
        while device_is_measured(device):
            self._metrics.observe_device(await asyncio.to_thread(measure_device, device))
            await asyncio.sleep(_DEVICE_USAGE_S)

    def announce(self, model: ModelInfo) -> None:
        """Give ``model`` the next index and send it to every worker, before any result that carries it."""
        self.models.append(model)
        for connection in self._connections:
            connection.send(wire.pack_model(len(self.models) - 1, model))

    def status(self) -> EngineStatus:
        """The engine's status, ``starting`` before there is one."""
        if self.engine is None:
            return EngineStatus("starting", None, "", "", 0)
        return replace(self.engine.status(), detail=self._store.refusal)

    def _report_status(self) -> None:
        frame = wire.pack_status(self.status())
        for connection in self._connections:
            connection.send(frame)


class _WorkerConnection(asyncio.Protocol):
    """One worker: its requests go to the engine, and the outcomes of one event-loop iteration go back as one frame."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._reader = wire.FrameReader()
        self._requests: dict[int, Request] = {}
        self._outcomes: list[tuple[int, Outcome]] = []
        self._explaining: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server._connections.add(self)
        for index, model in enumerate(self._server.models):
            self.send(wire.pack_model(index, model))
        self.send(wire.pack_status(self._server.status()))

    def connection_lost(self, error: Exception | None) -> None:
        """Cancel what a dead worker was waiting for."""
        self._transport = None
        self._server._connections.discard(self)
        if self._server.engine is not None:
            for request in self._requests.values():
                self._server.engine.cancel(request)
        for task in self._explaining:
            task.cancel()

    def send(self, frame: bytes) -> None:
        if self._transport is not None:
            self._transport.write(frame)

    def close(self) -> None:
        """Send what there is to send, then disconnect."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            for kind, payload in self._reader.feed(data):
                if kind is wire.Kind.PREDICT:
                    self._predict(payload)
                elif kind is wire.Kind.CANCEL:
                    self._cancel(payload)
                elif kind is wire.Kind.EXPLAIN:
                    self._begin_explaining(payload)
        except wire.WireError as error:
            logger.error("worker disconnected: %s", error)
            if self._transport is not None:
                self._transport.abort()

    def _ready_engine(self) -> tuple[LocalEngine, int]:
        """Return the engine and its input size in pixels."""
        assert self._server.engine is not None, "workers send nothing before the engine is ready"
        return self._server.engine, self._server.models[-1].input.size

    def _predict(self, payload: bytes) -> None:
        engine, size = self._ready_engine()
        for entry in wire.unpack_predict(payload, size):
            try:
                request = engine.submit(entry.images, entry.deadline, self._finisher(entry.id))
            except ServiceError as error:
                self._finish(entry.id, error)
            else:
                self._requests[entry.id] = request

    def _begin_explaining(self, payload: bytes) -> None:
        engine, size = self._ready_engine()
        task = self._loop.create_task(self._explain(engine, *wire.unpack_explain(payload, size)))
        self._explaining.add(task)
        task.add_done_callback(self._explaining.discard)

    async def _explain(
        self, engine: LocalEngine, id_: int, image: NDArray[np.uint8], label: int | None, deadline: float
    ) -> None:
        try:
            explanation = await engine.explain(image, label, deadline)
        except ServiceError as error:
            self.send(wire.pack_explanation(id_, error, 0))
        else:
            self.send(wire.pack_explanation(id_, explanation, self._server.models.index(explanation.model)))

    def _cancel(self, payload: bytes) -> None:
        engine, _ = self._ready_engine()
        for id_ in wire.unpack_cancel(payload):
            request = self._requests.pop(id_, None)
            if request is not None:
                engine.cancel(request)

    def _finisher(self, id_: int) -> Finish:
        return lambda outcome: self._finish(id_, outcome)

    def _finish(self, id_: int, outcome: Outcome) -> None:
        self._requests.pop(id_, None)
        if not self._outcomes:
            self._loop.call_soon(self.flush)
        self._outcomes.append((id_, outcome))

    def flush(self) -> None:
        """Send every outcome that has gathered."""
        outcomes, self._outcomes = self._outcomes, []
        engine = self._server.engine
        queue_depth = 0 if engine is None else engine.waiting_images
        by_model: dict[int, list[tuple[int, Outcome]]] = {}
        for id_, outcome in outcomes:
            index = 0 if isinstance(outcome, ServiceError) else self._server.models.index(outcome.model)
            by_model.setdefault(index, []).append((id_, outcome))
        for index, group in by_model.items():
            self.send(wire.pack_results(group, index, queue_depth))


def _return_memory() -> None:
    """Return to the system what a reload has freed; glibc keeps it otherwise."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def run_engine(settings: Settings, listener: socket.socket, files: ModelFiles, values: SharedValues) -> int:
    """Run the engine process's event loop until STOP_SIGNAL; return the exit status."""
    started = time.monotonic()
    with open_event_loop() as runner:
        server = EngineServer(settings, Metrics(values, ENGINE), ModelStore(settings, files))
        status = runner.run(server.run(listener))
    logger.info("engine stopped status=%d uptime_s=%.1f", status, time.monotonic() - started)
    return status
