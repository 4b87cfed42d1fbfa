"""The engine process: it alone owns the device and the weights, and serves the workers' sockets.

Owns: loading, the heartbeat, the watchdog over the device, and the way from frames to the engine and back.
A device that hangs, or fails known images too, ends this process: another one is started.
Does not know: HTTP, the other processes beyond their sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import EngineStatus, Finish, ModelInfo, Outcome, Request
from service.engine.local_engine import LoadedModel, LocalEngine
from service.engine.model_store import ModelRefused, ModelStore
from service.errors import ServiceError
from service.model.checkpoint import CheckpointError
from service.observability.metrics import ENGINE, Metrics
from service.observability.shared_values import SharedValues
from service.processes import wire
from service.processes.child import open_event_loop
from service.processes.process_state import STOP_SIGNAL, ProcessState, supervisor_is_gone
from service.processes.remote_engine import HEARTBEAT_S
from service.runtime.device_usage import device_is_measured, measure_device
from service.runtime.runner import RunnerError
from service.settings import Settings

logger = logging.getLogger(__name__)

EXIT_UNUSABLE = 3  # the checkpoint or the runtime cannot be used: starting again would not help
EXIT_DEVICE = 4  # the device hangs or fails every batch: a new process may

IDLE_CHECK_S = 5.0  # an idle device answers a known image this often, so that its death shows before a client meets it
_DEVICE_USAGE_S = 1.0
_CHECKPOINT_CHECK_S = 1.0


def make_engine(
    settings: Settings, model: LoadedModel, metrics: Metrics, on_full: Callable[[int], None] = lambda retry_after_s: None
) -> LocalEngine:
    """Start an engine for ``model`` on the running loop, with the limits of ``settings``; its batches count in ``metrics``.

    For ``on_full`` see ``LocalEngine``.
    """
    return LocalEngine(
        model,
        max_queue_images=settings.max_queue_images,
        queue_delay_ms=settings.queue_delay_ms,
        on_batch=metrics.observe_batch,
        on_full=on_full,
    )


class EngineServer:
    """Serves any number of workers, from before the model is loaded until told to stop."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        load: Callable[[Settings], LoadedModel] | None = None,
        on_beat: Callable[[], None] = lambda: None,
        on_full: Callable[[int], None] = lambda retry_after_s: None,
        idle_check_s: float = IDLE_CHECK_S,
    ) -> None:
        """Serve the checkpoint and what it becomes, or what ``load`` gives.

        ``on_beat`` is called four times a second; for ``on_full`` see ``LocalEngine``.
        """
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._store: ModelStore | None = None
        self._on_beat = on_beat
        self._on_full = on_full
        self._idle_check_s = idle_check_s
        self._stopping = asyncio.Event()
        self._connections: set[_WorkerConnection] = set()
        self.engine: LocalEngine | None = None
        self.models: list[ModelInfo] = []

    async def run(self, path: str) -> int:
        """Serve on the Unix socket ``path``; give the exit status."""
        loop = asyncio.get_running_loop()
        Path(path).unlink(missing_ok=True)
        server = await loop.create_unix_server(lambda: _WorkerConnection(self), path)
        tasks = [loop.create_task(self._beat())]
        try:
            if self._load is None:
                self._store = ModelStore(self._settings, Path(path).parent)
                model = await loop.run_in_executor(None, self._store.open)
            else:
                model = await loop.run_in_executor(None, self._load, self._settings)
            self.engine = make_engine(self._settings, model, self._metrics, self._on_full)
            tasks.append(loop.create_task(self._watch_device(model.runner.device)))
            self.announce(model.info)
            if self._store is not None:
                tasks.append(loop.create_task(self._follow_checkpoint(self.engine, self._store, model)))
            gc.collect()
            gc.freeze()  # what is loaded stays; collections need not look at it again
            loop.add_signal_handler(STOP_SIGNAL, self.stop)  # until here nothing was accepted, and the signal just ends it
            return await self._serve(self.engine)
        except (CheckpointError, RunnerError) as error:
            logger.error("cannot serve this model: %s", error)
            return EXIT_UNUSABLE
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
        """Watch over the device until told to stop or left alone, then drain."""
        self._tell_workers()
        while not self._stopping.is_set() and not supervisor_is_gone():
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

    async def _beat(self) -> None:
        """Give signs of life, from before the model is loaded until the end."""
        while True:
            self._on_beat()
            self._tell_workers()
            await asyncio.sleep(HEARTBEAT_S)

    async def _follow_checkpoint(self, engine: LocalEngine, store: ModelStore, model: LoadedModel) -> None:
        """Serve what the checkpoint file becomes, if it proves itself; SIGHUP looks at once, SIGUSR1 rolls back."""
        loop = asyncio.get_running_loop()
        look, back = asyncio.Event(), asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, look.set)
        loop.add_signal_handler(signal.SIGUSR1, back.set)
        previous: LoadedModel | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_first(look, back), _CHECKPOINT_CHECK_S)
            if back.is_set():
                back.clear()
                if previous is None:
                    logger.error("there is no model to roll back to")
                else:
                    store.roll_back(model)
                    model, previous = previous, None
                    self._replace_model(engine, model, "rolled_back")
            elif look.is_set() or store.has_new_file():
                look.clear()
                try:
                    new = await loop.run_in_executor(None, store.load_beside, model)
                except (CheckpointError, RunnerError, ModelRefused):
                    self._metrics.model_reloaded("refused")
                    self._tell_workers()
                    continue
                if new is not None:
                    model, previous = new, model
                    self._replace_model(engine, model, "loaded")

    def _replace_model(self, engine: LocalEngine, model: LoadedModel, outcome: str) -> None:
        """Swap between two batches; workers hear of the model before any answer carries it."""
        self.announce(model.info)
        old = engine.swap(model)
        self._metrics.model_reloaded(outcome)
        self._tell_workers()
        logger.info("model replaced outcome=%s old=%s new=%s", outcome, old.info.version, model.info.version)

    async def _watch_device(self, device: str) -> None:
        """Measure the GPU once a second; beside the loop, because the driver takes its time under load."""
        while device_is_measured(device):
            self._metrics.observe_device(await asyncio.to_thread(measure_device, device))
            await asyncio.sleep(_DEVICE_USAGE_S)

    def announce(self, model: ModelInfo) -> None:
        """Give ``model`` the next index and tell every worker what that stands for, before any answer carries it."""
        self.models.append(model)
        for connection in self._connections:
            connection.send(wire.pack_model(len(self.models) - 1, model))

    def status(self) -> EngineStatus:
        """Give the engine's state, ``starting`` before there is one."""
        if self.engine is None:
            return EngineStatus("starting", None, "", "", 0)
        return replace(self.engine.status(), detail="" if self._store is None else self._store.refusal)

    def _tell_workers(self) -> None:
        frame = wire.pack_status(self.status())
        for connection in self._connections:
            connection.send(frame)


class _WorkerConnection(asyncio.Protocol):
    """One worker: its requests go to the engine, and the outcomes of one turn of the loop go back as one frame."""

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

    def _predict(self, payload: bytes) -> None:
        engine = self._server.engine
        assert engine is not None, "workers send nothing before the engine is ready"
        model = engine.status().model
        assert model is not None, "a ready engine has a model"
        for entry in wire.unpack_predict(payload, model.input.size):
            try:
                request = engine.submit(entry.images, entry.deadline, self._finisher(entry.id))
            except ServiceError as error:
                self._finish(entry.id, error)
            else:
                self._requests[entry.id] = request

    def _begin_explaining(self, payload: bytes) -> None:
        engine = self._server.engine
        assert engine is not None, "workers send nothing before the engine is ready"
        model = engine.status().model
        assert model is not None, "a ready engine has a model"
        task = self._loop.create_task(self._explain(engine, *wire.unpack_explain(payload, model.input.size)))
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
        assert self._server.engine is not None, "nothing is cancelled before it was sent"
        for id_ in wire.unpack_cancel(payload):
            request = self._requests.pop(id_, None)
            if request is not None:
                self._server.engine.cancel(request)

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


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of ``events`` is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def run_engine(settings: Settings, path: str, state: ProcessState, values: SharedValues) -> int:
    """Run the engine process's event loop until STOP_SIGNAL; give the exit status."""
    started = time.monotonic()
    with open_event_loop() as runner:
        server = EngineServer(settings, Metrics(values, ENGINE), on_beat=state.engine_beat, on_full=state.set_engine_full)
        status = runner.run(server.run(path))
    logger.info("engine stopped status=%d uptime_s=%.1f", status, time.monotonic() - started)
    return status
