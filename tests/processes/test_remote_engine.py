"""The engine over a real Unix socket: ``RemoteEngine`` against the real ``EngineServer``, and against an odd peer."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.device_stream import LoadedModel
from service.engine.interface import LIKELIEST, EngineStatus, Outcome, Prediction, Request
from service.engine.model_store import ModelStore
from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from service.observability.metrics import ENGINE, Metrics, make_values
from service.observability.shared_values import Facts
from service.processes import engine_process, remote_engine, wire
from service.processes.child import EXIT_UNUSABLE, show_life
from service.processes.engine_process import EXIT_DEVICE, EngineServer
from service.processes.remote_engine import RemoteEngine
from service.runtime.runner import RunnerError
from service.settings import Settings, load_settings
from tests.support.fake_runner import KNOWN, FakeRunner, fake_model, images, mark_of, number_of_image, numbers_of, predict
from tests.support.patience import until

pytestmark = pytest.mark.anyio

LATER = time.monotonic() + 1e6  # a deadline that does not pass
MAX_BATCH_SIZE = 4
_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang
READY = EngineStatus("ready", fake_model(FakeRunner()).info, "cpu", "fake")


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops: uvloop is what the processes run on, asyncio what they fall back to."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is silent only because the machine is slow."""
    monkeypatch.setattr(remote_engine, "SILENCE_S", 60)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "engine.sock")


def settings_of(**settings: object) -> Settings:
    """The settings of an engine in the process of the tests, which a device that the test holds must not end."""
    limits = {"max_batch_size": 1, "max_images_per_request": 1, "device_timeout_s": 1e6, **settings}
    return load_settings([f"--{name}={value}" for name, value in limits.items()])


class OneModel(ModelStore):
    """A store that opens what ``load`` returns, and never another model."""

    def __init__(self, load: Callable[[], LoadedModel]) -> None:
        self.open = load  # type: ignore[method-assign]

    @property
    def refusal(self) -> str:
        """Return nothing."""
        return ""

    def has_new_file(self) -> bool:
        """Return False."""
        return False


def listening(path: str) -> socket.socket:
    """A Unix socket that listens on ``path``, as the supervisor hands it to an engine."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def serving(path: str, load: Callable[[], LoadedModel], **settings: object) -> AsyncIterator[EngineServer]:
    """Run an engine server on ``path`` over what ``load`` gives, and stop it in the end."""
    metrics = metrics_of_engine()
    server = EngineServer(settings_of(**settings), metrics, OneModel(load))
    running = asyncio.create_task(show_life(metrics.facts, server.run(listening(path))))
    try:
        async with asyncio.timeout(_PATIENCE_S):
            yield server
    finally:
        server.stop()
        await running


def metrics_of_engine() -> Metrics:
    """The metrics of an engine process, whose facts the workers share."""
    return Metrics(make_values(1), ENGINE)


def facts_of_peer() -> Facts:
    """The facts of an engine whose heartbeat is never old."""
    facts = Facts()
    facts.beat_at = math.inf
    return facts


@asynccontextmanager
async def connected(
    path: str,
    server: EngineServer | None = None,
    *,
    facts: Facts | None = None,
    max_queue_images: int = 64,
) -> AsyncIterator[RemoteEngine]:
    """Connect to ``path``, whether or not anybody listens there yet."""
    facts = facts or (facts_of_peer() if server is None else server._metrics.facts)
    engine = RemoteEngine(path, facts, max_batch_size=MAX_BATCH_SIZE, max_queue_images=max_queue_images)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            yield engine
    finally:
        engine.close()


@asynccontextmanager
async def served(path: str, runner: FakeRunner, **settings: Any) -> AsyncIterator[tuple[RemoteEngine, EngineServer]]:
    """Yield a remote engine that is ready, and its server."""
    async with (
        serving(path, lambda: fake_model(runner), **settings) as server,
        connected(path, server, max_queue_images=settings.get("max_queue_images", 64)) as engine,
    ):
        await until(lambda: engine.state == "ready")
        try:
            yield engine, server
        finally:
            runner.open()


class Peer:
    """Whoever answers a ``RemoteEngine``, frame by frame, as the test says."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def __aenter__(self) -> Peer:
        self._server = await asyncio.start_unix_server(lambda *streams: self._connections.put_nowait(streams), self._path)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.writer.close()

    async def accept(self) -> None:
        """Take the next connection and say that a model is ready."""
        self.reader, self.writer = await self._connections.get()
        self.writer.write(wire.pack_status(READY))

    async def requests(self) -> list[wire.RequestRow]:
        """Read one frame of requests."""
        frames = wire.FrameReader()
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                for head, body in frames.feed(await self.reader.readexactly(1)):
                    return wire.unpack_requests(head, body, 32)


async def test_answers_come_back_to_whom_they_belong(path: str) -> None:
    """Concurrent requests of several sizes are batched together and each gets its own answer, with the model's version."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, _):
        tasks = [asyncio.create_task(predict(engine, images(0), LATER))]
        await runner.until_batches(1)
        for numbers in ((1, 2), (3,), (4,), (5, 6, 7, 8)):
            tasks.append(asyncio.create_task(predict(engine, images(*numbers), LATER)))
        await until(lambda: engine.status().queue_depth == 8)
        runner.open()
        predictions = await asyncio.gather(*tasks)
    assert runner.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert [numbers_of(prediction.probabilities) for prediction in predictions] == [[0], [1, 2], [3], [4], [5, 6, 7, 8]]
    assert {prediction.model.version for prediction in predictions} == {"0123456789ab"}
    assert [prediction.batch_size for prediction in predictions] == [1, 4, 4, 4, 4]


async def test_the_status_is_the_engines_own(path: str) -> None:
    """State, model, device and runtime are those of the engine behind the socket."""
    async with served(path, FakeRunner()) as (engine, server):
        assert engine.status() == server.engine.status()


async def test_workers_share_one_engine(path: str) -> None:
    """Requests of two connections fill one batch, and no answer strays to the other connection."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (one, server), connected(path, server) as other:
        await until(lambda: other.status().state == "ready")
        tasks = [asyncio.create_task(predict(one, images(0), LATER))]
        await runner.until_batches(1)
        tasks += [asyncio.create_task(predict(engine, images(number), LATER)) for number, engine in ((1, one), (2, other))]
        await until(lambda: one.status().queue_depth == 2)
        runner.open()
        predictions = await asyncio.gather(*tasks)
    assert sorted(runner.batches[1]) == [1, 2]
    assert [numbers_of(prediction.probabilities) for prediction in predictions] == [[0], [1], [2]]


async def test_in_a_crowd_nobody_gets_anothers_answer(path: str) -> None:
    """Three workers, requests of every size, bad images, clients that leave: each request ends by its own images."""
    runner = FakeRunner(max_batch_size=MAX_BATCH_SIZE)
    runner.fails = lambda numbers: any(number % 17 == 0 for number in numbers)
    chance = random.Random(0)
    async with served(path, runner) as (one, server), connected(path, server) as two, connected(path, server) as three:
        engines = (one, two, three)
        await until(lambda: all(engine.state == "ready" for engine in engines))
        asked: list[tuple[list[int], asyncio.Task[Prediction], bool]] = []
        for start in range(0, 1600, MAX_BATCH_SIZE):
            numbers = list(range(start, start + chance.randint(1, MAX_BATCH_SIZE)))
            task = asyncio.create_task(predict(chance.choice(engines), images(*numbers), LATER))
            asked.append((numbers, task, chance.random() < 0.2))
            for _, earlier, leaves in asked[-5:]:
                if leaves:
                    earlier.cancel()
            await until(lambda: sum(not task.done() for _, task, _ in asked) < chance.randint(1, 20))
        await asyncio.wait([task for _, task, _ in asked])
    for numbers, task, leaves in asked:
        if task.cancelled():
            assert leaves
        elif any(number % 17 == 0 for number in numbers):
            assert type(task.exception()) is InferenceFailed
        else:
            assert numbers_of(task.result().probabilities) == numbers


async def test_errors_keep_their_type(path: str) -> None:
    """The engine's refusals arrive as what they are: failed, overloaded with its Retry-After, too late."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    runner.fails = lambda numbers: 13 in numbers
    async with served(path, runner, max_queue_images=4) as (engine, _):
        on_device = asyncio.create_task(predict(engine, images(13), LATER))
        await runner.until_batches(1)
        waiting = asyncio.create_task(predict(engine, images(1, 2, 3, 4), LATER))
        await until(lambda: engine.status().queue_depth == 4)
        with pytest.raises(Overloaded) as refused:
            await predict(engine, images(5), LATER)
        assert refused.value.retry_after_s
        waiting.cancel()
        await until(lambda: engine.status().queue_depth == 0)
        with pytest.raises(DeadlineExceeded):
            await predict(engine, images(6), time.monotonic() - 1)
        runner.open()
        with pytest.raises(InferenceFailed):
            await on_device


async def test_a_full_queue_refuses_before_the_wire(path: str) -> None:
    """What the engine says of its queue in shared memory holds for every worker, until there is room again."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with (
        served(path, runner, max_queue_images=2) as (engine, server),
        connected(path, server, max_queue_images=2) as other,
    ):
        await until(lambda: other.state == "ready")
        on_device = asyncio.create_task(predict(engine, images(0), LATER))
        await runner.until_batches(1)
        other.check_room()
        waiting = asyncio.create_task(predict(engine, images(1, 2), LATER))
        await until(lambda: other.status().queue_depth == 2)
        with pytest.raises(Overloaded) as refused:
            other.check_room()
        assert refused.value.retry_after_s
        runner.open()
        await asyncio.gather(on_device, waiting)
        other.check_room()


async def test_a_deadline_passes_over_the_wire(path: str) -> None:
    """A request whose deadline passes while it waits ends with DeadlineExceeded and never reaches the device."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, server):
        first = asyncio.create_task(predict(engine, images(1), LATER))
        await runner.until_batches(1)
        with pytest.raises(DeadlineExceeded):
            await predict(engine, images(2), time.monotonic() + 0.1)
        await until(lambda: server.engine.status().queue_depth == 0)
        runner.open()
        await first
    assert runner.batches == [[1]]


async def test_a_cancellation_reaches_the_engine(path: str) -> None:
    """A cancelled request gives its place in the engine's queue back and never reaches the device."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, server):
        first = asyncio.create_task(predict(engine, images(1), LATER))
        await runner.until_batches(1)
        gone = asyncio.create_task(predict(engine, images(2), LATER))
        stays = asyncio.create_task(predict(engine, images(3), LATER))
        await until(lambda: server.engine.status().queue_depth == 2)
        gone.cancel()
        await until(lambda: server.engine.status().queue_depth == 1)
        runner.open()
        await asyncio.gather(first, stays)
    assert runner.batches == [[1], [3]]


async def test_a_request_cancelled_before_it_was_sent_never_runs(path: str) -> None:
    """Submitted and cancelled in one event-loop iteration, a request leaves no trace on the device."""
    runner = FakeRunner(max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, _):
        outcomes: list[Outcome] = []
        engine.cancel(engine.submit(images(1), LATER, outcomes.append))
        assert numbers_of((await predict(engine, images(2), LATER)).probabilities) == [2]
    assert outcomes == []
    assert runner.batches == [[2]]


async def test_the_end_of_a_worker_cancels_what_it_waited_for(path: str) -> None:
    """When a worker's connection is gone, its waiting requests are not run for nobody; those of others are."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, server):
        async with connected(path, server) as leaving:
            await until(lambda: leaving.status().state == "ready")
            first = asyncio.create_task(predict(engine, images(1), LATER))
            await runner.until_batches(1)
            lost = asyncio.create_task(predict(leaving, images(2), LATER))
            await until(lambda: server.engine.status().queue_depth == 1)
        with pytest.raises(NotReady):
            await lost
        await until(lambda: server.engine.status().queue_depth == 0)
        runner.open()
        await first
    assert runner.batches == [[1]]


async def test_the_own_bound_refuses_before_the_wire(path: str) -> None:
    """What waits is bounded in images although the engine reads nothing; cancelled requests give their place back."""
    async with Peer(path) as peer, connected(path, max_queue_images=5) as engine:
        await peer.accept()
        await until(lambda: engine.state == "ready")
        engine.submit(images(1, 2, 3), LATER, lambda outcome: None)
        request = engine.submit(images(4, 5), LATER, lambda outcome: None)
        with pytest.raises(Overloaded):
            engine.submit(images(6), LATER, lambda outcome: None)
        engine.cancel(request)
        engine.submit(images(7, 8), LATER, lambda outcome: None)


async def test_images_of_another_shape_are_refused_here(path: str) -> None:
    """A wrong array is the caller's ValueError; it never costs the connection, or the neighbours on it."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, _):
        task = asyncio.create_task(predict(engine, images(1), LATER))
        await runner.until_batches(1)
        for wrong in (np.zeros((MAX_BATCH_SIZE + 1, 3, 32, 32), np.uint8), np.zeros((1, 3, 8, 8), np.uint8)):
            with pytest.raises(ValueError, match="a request is uint8"):
                await predict(engine, wrong, LATER)
        runner.open()
        assert numbers_of((await task).probabilities) == [1]


async def test_a_replaced_model_answers_under_its_own_version(path: str) -> None:
    """Over a swap, every answer carries the version of the model that made it, and the status names the new one."""
    old, new = FakeRunner(held=True, mark=1), FakeRunner(mark=2)
    async with served(path, old) as (engine, server):
        before = asyncio.create_task(predict(engine, images(1), LATER))
        await old.until_batches(1)
        waiting = asyncio.create_task(predict(engine, images(2), LATER))
        await until(lambda: server.engine.status().queue_depth == 1)
        replacement = fake_model(new, "ba9876543210")
        server.engine.swap(replacement)
        old.open()
        first, second = await asyncio.gather(before, waiting)
        model = engine.model
    assert (first.model.version, mark_of(first.probabilities)) == ("0123456789ab", 1)
    assert (second.model.version, mark_of(second.probabilities)) == ("ba9876543210", 2)
    assert model == replacement.info


async def test_before_the_model_is_loaded_nothing_is_ready(path: str) -> None:
    """While the server loads, workers refuse with NotReady; they hear when it is ready."""
    load, loads = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    changes: list[str] = []

    def slow() -> LoadedModel:
        loop.call_soon_threadsafe(loads.set)
        asyncio.run_coroutine_threadsafe(load.wait(), loop).result()
        return fake_model(FakeRunner())

    async with serving(path, slow) as server:
        engine = RemoteEngine(
            path,
            server._metrics.facts,
            max_batch_size=1,
            max_queue_images=1,
            on_change=lambda: changes.append(engine.state),
        )
        await loads.wait()
        with pytest.raises(NotReady):
            await predict(engine, images(1), LATER)
        assert "ready" not in changes
        load.set()
        await until(lambda: "ready" in changes)
        assert numbers_of((await predict(engine, images(1), LATER)).probabilities) == [1]
        engine.close()


async def test_a_model_that_cannot_be_served_ends_the_server(path: str) -> None:
    """A checkpoint or runtime that cannot be used gives the exit status that says so."""

    def broken() -> LoadedModel:
        raise RunnerError("it does not answer as it must")

    server = EngineServer(settings_of(), metrics_of_engine(), OneModel(broken))
    with listening(path) as listener:
        assert await server.run(listener) == EXIT_UNUSABLE


async def test_a_dead_device_ends_the_server_and_fails_what_waits(path: str) -> None:
    """A device that fails known images too gives the exit status that starts another process; nobody is left waiting."""
    runner = FakeRunner(held=True, max_batch_size=1)
    runner.fails = lambda numbers: True
    server = EngineServer(settings_of(), metrics_of_engine(), OneModel(lambda: fake_model(runner)))
    running = asyncio.create_task(server.run(listening(path)))
    async with connected(path) as engine:
        await until(lambda: engine.state == "ready")
        tasks = [asyncio.create_task(predict(engine, images(number), LATER)) for number in range(6)]
        await runner.until_batches(1)
        runner.open()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert await running == EXIT_DEVICE
        await until(lambda: engine.state != "ready")
    assert {type(answer) for answer in answers} == {InferenceFailed, NotReady}


async def test_a_device_nobody_asks_is_checked(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any request, the device answers known images; one that fails them ends the server before a client meets it."""
    monkeypatch.setattr(engine_process, "IDLE_CHECK_S", 0)
    runner = FakeRunner(max_batch_size=MAX_BATCH_SIZE)
    server = EngineServer(settings_of(), metrics_of_engine(), OneModel(lambda: fake_model(runner)))
    running = asyncio.create_task(server.run(listening(path)))
    await runner.until_batches(2)
    assert server.engine.status().state == "ready"
    runner.fails = lambda numbers: True
    assert await running == EXIT_DEVICE
    assert {number for batch in runner.batches for number in batch} == {KNOWN}


def serve_hung_device(path: str) -> None:
    """Run an engine whose device never ends a batch; the main function of a process."""
    server = EngineServer(
        settings_of(device_timeout_s=2), metrics_of_engine(), OneModel(lambda: fake_model(FakeRunner(held=True)))
    )
    sys.exit(asyncio.run(server.run(listening(path))))


async def test_a_hung_device_ends_the_process_and_fails_what_waits(path: str) -> None:
    """A batch that does not come back in ``device_timeout_s`` costs the process, and nobody waits for its deadline."""
    process = multiprocessing.get_context("spawn").Process(target=serve_hung_device, args=(path,))
    process.start()
    try:
        async with connected(path) as engine:
            await until(lambda: engine.state == "ready")
            with pytest.raises(NotReady):
                await predict(engine, images(1), LATER)
        await asyncio.to_thread(process.join)
        assert process.exitcode == EXIT_DEVICE
    finally:
        process.kill()
        process.join()
        process.close()


async def test_the_beat_goes_on_while_the_model_loads(path: str) -> None:
    """Signs of life come from the first moment, so that a slow start is not taken for a hanging engine."""
    loading = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow() -> LoadedModel:
        asyncio.run_coroutine_threadsafe(loading.wait(), loop).result()
        return fake_model(FakeRunner())

    metrics = metrics_of_engine()
    server = EngineServer(settings_of(), metrics, OneModel(slow))
    running = asyncio.create_task(show_life(metrics.facts, server.run(listening(path))))
    await until(lambda: metrics.facts.beat_at > 0)
    began = time.monotonic()
    await until(lambda: metrics.facts.beat_at > began)
    assert not metrics.facts.ready
    loading.set()
    await until(lambda: metrics.facts.ready)
    server.stop()
    assert await running == 0


async def test_a_lost_engine_fails_what_waits_at_once_and_is_found_again(path: str) -> None:
    """When the connection breaks, every waiting request gets NotReady; when an engine is back, it answers."""
    async with Peer(path) as peer, connected(path) as engine:
        await peer.accept()
        await until(lambda: engine.state == "ready")
        tasks = [asyncio.create_task(predict(engine, images(number), LATER)) for number in range(3)]
        explaining = asyncio.create_task(engine.explain(images(1)[0], None, LATER))
        assert [number_of_image(pixels[0]) for _, pixels, _, _ in await peer.requests()] == [0, 1, 2, 1]
        peer.writer.close()
        answers = await asyncio.gather(*tasks, explaining, return_exceptions=True)
        assert [type(answer) for answer in answers] == [NotReady] * 4
        await peer.accept()
        await until(lambda: engine.state == "ready")
        task = asyncio.create_task(predict(engine, images(7), LATER))
        [(id_, *_)] = await peer.requests()
        row = np.full((1, 10), 0.1, np.float32)
        model = fake_model(FakeRunner()).info
        peer.writer.write(wire.pack_outcomes([(id_, Prediction(row, model, 0.0, 0.0, 1))]))
        np.testing.assert_array_equal((await task).probabilities, row)


async def test_an_engine_that_was_never_there_is_not_ready(path: str) -> None:
    """Without anybody at the socket the state is starting, and requests are refused."""
    async with connected(path) as engine:
        with pytest.raises(NotReady):
            await predict(engine, images(1), LATER)
        assert engine.state == "starting"


async def test_an_engine_that_hangs_keeps_nobody_beyond_the_deadline(path: str) -> None:
    """Predictions and explanations end at their deadline without any caller's timer; the engine's late result is dropped."""
    async with Peer(path) as peer, connected(path) as engine:
        await peer.accept()
        await until(lambda: engine.state == "ready")
        outcomes: list[object] = []
        deadline = time.monotonic() + 0.05
        engine.submit(images(1), deadline, outcomes.append)
        engine.submit(images(2), deadline, outcomes.append, LIKELIEST)
        [(id_, *_), _] = await peer.requests()
        await until(lambda: len(outcomes) == 2)
        row = np.full((1, 10), 0.1, np.float32)
        late = Prediction(row, fake_model(FakeRunner()).info, 0.0, 0.0, 1)
        peer.writer.write(wire.pack_outcomes([(id_, late)]) + wire.pack_status(replace(READY, detail="later")))
        await until(lambda: engine.status().detail == "later")
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded, DeadlineExceeded]


async def test_a_silent_engine_is_not_ready(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose heartbeat stays away is not ready although its socket is open; its next beat makes it ready again."""
    monkeypatch.setattr(remote_engine, "SILENCE_S", 0.05)
    facts = facts_of_peer()
    async with Peer(path) as peer, connected(path, facts=facts) as engine:
        await peer.accept()
        await until(lambda: engine.state == "ready")
        facts.beat_at = time.monotonic()
        await until(lambda: engine.state == "starting")
        assert engine.status().state == "starting"
        with pytest.raises(NotReady):
            await predict(engine, images(1), LATER)
        facts.beat_at = math.inf
        assert engine.state == "ready"


@pytest.mark.parametrize(
    "damage", [b"\xff" * 64, wire.pack_outcomes([])[:-1] + b"\xff" * 9], ids=["no frame", "a frame that lies"]
)
async def test_a_damaged_frame_ends_the_connection_and_fails_what_waits(path: str, damage: bytes) -> None:
    """Bytes that are no sound frame are not waited on: requests fail at once, and a new connection begins."""
    async with Peer(path) as peer, connected(path) as engine:
        await peer.accept()
        await until(lambda: engine.state == "ready")
        task = asyncio.create_task(predict(engine, images(1), LATER))
        await peer.requests()
        peer.writer.write(damage)
        with pytest.raises(NotReady):
            await task
        peer.writer.close()
        await peer.accept()
        await until(lambda: engine.state == "ready")


async def test_a_damaged_frame_from_a_worker_costs_only_its_connection(path: str) -> None:
    """The server disconnects a worker that sends nonsense, cancels what it waited for, and serves the others on."""
    runner = FakeRunner(held=True, max_batch_size=MAX_BATCH_SIZE)
    async with served(path, runner) as (engine, server):
        first = asyncio.create_task(predict(engine, images(1), LATER))
        await runner.until_batches(1)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(wire.pack_requests([Request(images(2), LATER, print)]))
        await until(lambda: server.engine.status().queue_depth == 1)
        writer.write(wire.pack_requests([Request(images(3), LATER, print)])[:-1] + b"\0\xff\0\0\0\xff\xff\xff\xff")
        await asyncio.wait_for(reader.read(), _PATIENCE_S)
        writer.close()
        await until(lambda: len(server._connections) == 1)
        runner.open()
        assert numbers_of((await first).probabilities) == [1]
    assert 2 not in {number for batch in runner.batches for number in batch}


async def test_a_closed_engine_fails_what_waits_and_stays_away(path: str) -> None:
    """Closing ends every request with NotReady and connects no more."""
    async with Peer(path) as peer:
        async with connected(path) as engine:
            await peer.accept()
            await until(lambda: engine.state == "ready")
            task = asyncio.create_task(predict(engine, images(1), LATER))
            await peer.requests()
        with pytest.raises(NotReady):
            await task
        with pytest.raises(NotReady):
            await predict(engine, images(2), LATER)


def test_a_worker_loads_none_of_the_engines_machine() -> None:
    """Importing the remote engine loads no checkpoint format, no runner and no batching."""
    heavy = {
        "safetensors",
        "service.engine.device_stream",
        "service.engine.explainer",
        "service.engine.local_engine",
        "service.model.checkpoint",
        "service.model.class_activation",
        "service.runtime",
    }
    script = "import sys, service.processes.remote_engine; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert heavy.isdisjoint(loaded.split())
