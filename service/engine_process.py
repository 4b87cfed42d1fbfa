"""The engine process: it alone owns the device and the weights, and serves the workers' sockets.

Owns: loading, the heartbeat, the watchdog over the device, and the way from frames to the engine and back.
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
from dataclasses import replace
from pathlib import Path
from typing import cast

from service import wire
from service.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from service.class_activation import ClassActivation
from service.device_usage import device_is_measured, measure_device
from service.engine import EngineStatus, Finish, LoadedModel, LocalEngine, ModelInfo, Outcome, Request
from service.errors import ServiceError
from service.metrics import ENGINE, Metrics
from service.remote_engine import HEARTBEAT_S
from service.runner import RunnerError, RunnerOptions, check_canary, open_runner
from service.settings import Settings
from service.shared_values import SharedValues

logger = logging.getLogger(__name__)

EXIT_UNUSABLE = 3  # the checkpoint or the runtime cannot be used: starting again would not help
EXIT_DEVICE = 4  # the device hangs or fails every batch: a new process may

_DEVICE_USAGE_S = 1.0


def load_model(settings: Settings) -> LoadedModel:
    """Load the checkpoint of ``settings`` onto the device, warmed up and checked; raise CheckpointError or RunnerError."""
    checkpoint = load_checkpoint(settings.checkpoint)
    options = RunnerOptions(
        runtime=settings.runtime,
        device=settings.device,
        precision=settings.precision,
        threads=settings.cpu_threads,
        streams=settings.streams,
        max_batch_size=settings.max_batch_size,
    )
    metadata = checkpoint.metadata
    info = ModelInfo(metadata.name, checkpoint.version, metadata.class_names, metadata.input)
    runner = open_runner(checkpoint, options)
    known = replace(checkpoint, weights={})  # its answers are checked again later; the weights are on the device now
    return LoadedModel(runner, info, lambda stream: check_canary(runner, known, stream), _explain_with(checkpoint))


def _explain_with(checkpoint: Checkpoint) -> ClassActivation | None:
    try:
        return ClassActivation(checkpoint)
    except CheckpointError as error:
        logger.warning("answers are not explained: %s", error)
        return None


def make_engine(settings: Settings, model: LoadedModel, metrics: Metrics) -> LocalEngine:
    """Start an engine for ``model`` on the running loop, with the limits of ``settings``; its batches count in ``metrics``."""
    return LocalEngine(
        model,
        max_batch_size=settings.max_batch_size,
        max_queue_images=settings.max_queue_images,
        queue_delay_ms=settings.queue_delay_ms,
        on_batch=metrics.observe_batch,
    )


class EngineServer:
    """Serves any number of workers, from before the model is loaded until told to stop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._connections: set[_WorkerConnection] = set()
        self.engine: LocalEngine | None = None
        self.models: list[ModelInfo] = []

    async def run(self, path: str) -> int:
        """Serve on the Unix socket ``path``; give the exit status."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        Path(path).unlink(missing_ok=True)
        server = await loop.create_unix_server(lambda: _WorkerConnection(self), path)
        loading = loop.run_in_executor(None, load_model, self._settings)
        try:
            model = await loading
        except (CheckpointError, RunnerError) as error:
            logger.error("cannot serve this model: %s", error)
            return EXIT_UNUSABLE
        self.engine = make_engine(self._settings, model, self._metrics)
        watching = loop.create_task(self._watch_device(model.runner.device))
        self.announce(model.info)
        gc.collect()
        gc.freeze()  # what is loaded stays; collections need not look at it again
        parent = os.getppid()
        while not stop.is_set() and os.getppid() == parent:
            self._heartbeat()
            if self.engine.longest_running_s > self._settings.device_timeout_s:
                logger.error("device hangs: a batch has run for %.1f s", self.engine.longest_running_s)
                os._exit(EXIT_DEVICE)  # its thread cannot be stopped any other way
            if self.engine.status().state == "failed":
                return EXIT_DEVICE
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), HEARTBEAT_S)
        server.close()
        watching.cancel()
        await self.engine.drain(self._settings.drain_timeout_s)
        for connection in self._connections:
            connection.flush()
        await asyncio.sleep(0)
        self.engine.close()
        return 0

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
        return EngineStatus("starting", None, "", "", 0) if self.engine is None else self.engine.status()

    def _heartbeat(self) -> None:
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

    def data_received(self, data: bytes) -> None:
        for kind, payload in self._reader.feed(data):
            if kind is wire.Kind.PREDICT:
                self._predict(payload)
            elif kind is wire.Kind.CANCEL:
                self._cancel(payload)
            elif kind is wire.Kind.EXPLAIN:
                task = self._loop.create_task(self._explain(payload))
                self._explaining.add(task)
                task.add_done_callback(self._explaining.discard)

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

    async def _explain(self, payload: bytes) -> None:
        engine = self._server.engine
        assert engine is not None, "workers send nothing before the engine is ready"
        model = engine.status().model
        assert model is not None, "a ready engine has a model"
        id_, image, label, deadline = wire.unpack_explain(payload, model.input.size)
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
        queue_depth = self._server.status().queue_depth
        by_model: dict[int, list[tuple[int, Outcome]]] = {}
        for id_, outcome in outcomes:
            index = 0 if isinstance(outcome, ServiceError) else self._server.models.index(outcome.model)
            by_model.setdefault(index, []).append((id_, outcome))
        for index, group in by_model.items():
            self.send(wire.pack_results(group, index, queue_depth))


def run_engine(settings: Settings, path: str, values: SharedValues) -> int:
    """Run the engine process's event loop until SIGTERM; give the exit status."""
    started = time.monotonic()
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        status = runner.run(EngineServer(settings, Metrics(values, ENGINE)).run(path))
    logger.info("engine stopped status=%d uptime_s=%.1f", status, time.monotonic() - started)
    return status
