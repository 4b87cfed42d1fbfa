"""What the engine promises, on a device that the test holds and lets go."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from functools import partial

import numpy as np
import pytest

from service.engine.interface import Outcome, Prediction, settle
from service.engine.local_engine import LocalEngine
from service.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from tests.support.fake_runner import (
    KNOWN,
    FakeRunner,
    PolledFakeRunner,
    fake_model,
    images,
    mark_of,
    numbers_of,
    predict,
    running_engine,
)
from tests.support.patience import until

pytestmark = pytest.mark.anyio

MakeRunner = type[FakeRunner]
LATER = math.inf  # a deadline that does not pass


@pytest.fixture(params=[FakeRunner, PolledFakeRunner], ids=["thread", "polled"])
def make_runner(request: pytest.FixtureRequest) -> MakeRunner:
    """The class of a device that is waited for by a thread, and of one that the event loop polls."""
    made: MakeRunner = request.param
    return made


def ask(engine: LocalEngine, *numbers: int, deadline: float = LATER) -> asyncio.Future[Prediction]:
    """Submit one request for the images of these numbers."""
    future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
    engine.submit(images(*numbers), deadline, partial(settle, future))
    return future


async def test_an_idle_engine_answers_one_at_once(make_runner: MakeRunner) -> None:
    """One request to an idle engine is a batch of its own: nothing waits for company."""
    runner = make_runner()
    async with running_engine(runner) as engine:
        prediction = await predict(engine, images(7), LATER)
    assert runner.batches == [[7]]
    assert numbers_of(prediction.probabilities) == [7]
    assert prediction.batch_size == 1
    assert prediction.model.version == "0123456789ab"


async def test_batches_form_while_the_device_is_busy(make_runner: MakeRunner) -> None:
    """What comes while a batch runs is taken together when it ends."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        first = ask(engine, 0)
        await runner.until_batches(1)
        others = [ask(engine, number) for number in range(1, 6)]
        assert engine.status().queue_depth == 5
        runner.let_go(2)
        predictions = await asyncio.gather(first, *others)
    assert runner.batches == [[0], [1, 2, 3, 4, 5]]
    assert [numbers_of(prediction.probabilities) for prediction in predictions] == [[0], [1], [2], [3], [4], [5]]
    assert [prediction.batch_size for prediction in predictions] == [1, 5, 5, 5, 5, 5]


async def test_what_arrives_in_one_iteration_runs_together(make_runner: MakeRunner) -> None:
    """Requests of one event-loop iteration are one batch, although the device is idle."""
    runner = make_runner()
    async with running_engine(runner) as engine:
        await asyncio.gather(*(ask(engine, number) for number in range(4)))
    assert runner.batches == [[0, 1, 2, 3]]


async def test_no_batch_is_larger_than_its_limit(make_runner: MakeRunner) -> None:
    """A batch ends before the request that does not fit, and keeps the order."""
    runner = make_runner(max_batch_size=4, held=True)
    async with running_engine(runner) as engine:
        tasks = [ask(engine, 0)]
        await runner.until_batches(1)
        tasks += [ask(engine, 1, 2), ask(engine, 3), ask(engine, 4, 5, 6, 7), ask(engine, 8)]
        runner.open()
        answers = await asyncio.gather(*tasks)
    assert runner.batches == [[0], [1, 2, 3], [4, 5, 6, 7], [8]]
    assert [numbers_of(answer.probabilities) for answer in answers] == [[0], [1, 2], [3], [4, 5, 6, 7], [8]]


async def test_a_request_larger_than_a_share_runs_whole(make_runner: MakeRunner) -> None:
    """A request of more images than the share is a batch of its own."""
    runner = make_runner(streams=2, efficient_batch=1)
    async with running_engine(runner) as engine:
        answers = await asyncio.gather(ask(engine, 0), ask(engine, 1, 2, 3, 4, 5), ask(engine, 6))
    assert [numbers_of(answer.probabilities) for answer in answers] == [[0], [1, 2, 3, 4, 5], [6]]
    assert [1, 2, 3, 4, 5] in runner.batches


async def test_a_second_stream_takes_full_batches_only(make_runner: MakeRunner) -> None:
    """On a device of its own, requests gather while a batch runs, and begin concurrently once they are a full batch."""
    runner = make_runner(max_batch_size=3, streams=2, held=True)
    async with running_engine(runner) as engine:
        tasks = [ask(engine, 0)]
        await runner.until_batches(1)
        tasks += [ask(engine, 1), ask(engine, 2)]
        assert engine.status().queue_depth == 2
        tasks.append(ask(engine, 3))
        await runner.until_batches(2)
        runner.open()
        answers = await asyncio.gather(*tasks)
    assert sorted(runner.batches) == [[0], [1, 2, 3]]
    assert [numbers_of(answer.probabilities) for answer in answers] == [[0], [1], [2], [3]]


async def test_a_delay_waits_for_company_but_a_full_batch_does_not_wait(make_runner: MakeRunner) -> None:
    """With a queue delay of an hour, a batch still begins as soon as it is full."""
    runner = make_runner(max_batch_size=3)
    async with running_engine(runner, queue_delay_ms=3_600_000) as engine, asyncio.timeout(60):
        tasks = [ask(engine, 1)]
        assert engine.status().queue_depth == 1
        tasks += [ask(engine, 2), ask(engine, 3)]
        await asyncio.gather(*tasks)
    assert runner.batches == [[1, 2, 3]]


async def test_the_bound_counts_images_exactly(make_runner: MakeRunner) -> None:
    """The queue takes images up to its bound, refuses the next with Overloaded, and counts no more than what waits."""
    runner = make_runner(max_batch_size=4, held=True)
    async with running_engine(runner, max_queue_images=10) as engine:
        on_device = ask(engine, 0, 1, 2, 3)
        await runner.until_batches(1)
        leaving = engine.submit(images(4, 5, 6, 7), LATER, lambda outcome: None)
        waiting = [ask(engine, 8, 9, 10, 11)]
        assert engine.status().queue_depth == 8
        with pytest.raises(Overloaded) as refused:
            await predict(engine, images(12, 13, 14), LATER)
        assert refused.value.retry_after_s
        waiting.append(ask(engine, 15, 16))
        assert engine.status().queue_depth == 10
        with pytest.raises(Overloaded):
            await predict(engine, images(17), LATER)
        engine.cancel(leaving)
        waiting.append(ask(engine, 18, 19, 20, 21))
        assert engine.status().queue_depth == 10
        runner.open()
        await asyncio.gather(on_device, *waiting)
        assert engine.status().queue_depth == 0
    assert [number for batch in runner.batches for number in batch] == [0, 1, 2, 3, 8, 9, 10, 11, 15, 16, 18, 19, 20, 21]


async def test_a_full_queue_refuses_before_an_image_is_decoded(make_runner: MakeRunner) -> None:
    """``check_room`` refuses as ``submit`` would, and knows of cancelled requests."""
    runner = make_runner(held=True)
    async with running_engine(runner, max_queue_images=3) as engine:
        on_device = ask(engine, 0)
        await runner.until_batches(1)
        engine.check_room()
        waiting, leaving = ask(engine, 1, 2), engine.submit(images(3), LATER, lambda outcome: None)
        with pytest.raises(Overloaded):
            engine.check_room()
        engine.cancel(leaving)
        engine.check_room()
        runner.open()
        await asyncio.gather(on_device, waiting)
    with pytest.raises(NotReady):
        engine.check_room()


async def test_retry_after_follows_the_backlog(make_runner: MakeRunner) -> None:
    """A full queue behind a slow device asks for more patience than the least, in whole seconds."""
    runner = make_runner(held=True)
    async with running_engine(runner, max_queue_images=2) as engine:
        engine._load.images_per_s = 0.1  # as measured on a very slow device
        tasks = [ask(engine, 0)]
        await runner.until_batches(1)
        tasks += [ask(engine, 1), ask(engine, 2)]
        with pytest.raises(Overloaded) as refused:
            await predict(engine, images(3), LATER)
        assert refused.value.retry_after_s == 30
        runner.open()
        await asyncio.gather(*tasks)


async def test_a_cancelled_request_never_reaches_the_device(make_runner: MakeRunner) -> None:
    """A request whose task is cancelled while it waits is dropped; its neighbours run."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        before = ask(engine, 0)
        await runner.until_batches(1)
        one, leaving, three = (asyncio.create_task(predict(engine, images(number), LATER)) for number in (1, 2, 3))
        await until(lambda: engine.status().queue_depth == 3)
        leaving.cancel()
        await asyncio.wait([leaving])
        runner.open()
        await asyncio.gather(before, one, three)
    assert runner.batches == [[0], [1, 3]]
    assert leaving.cancelled()


async def test_a_request_cancelled_on_the_device_is_not_finished(make_runner: MakeRunner) -> None:
    """Cancelling what is already on the device ends the request at once and disturbs nobody."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        gone = asyncio.create_task(predict(engine, images(1), LATER))
        await runner.until_batches(1)
        stays = ask(engine, 2)
        gone.cancel()
        await asyncio.wait([gone])
        runner.open()
        assert numbers_of((await stays).probabilities) == [2]
    assert gone.cancelled()


async def test_a_cancelled_request_hears_nothing(make_runner: MakeRunner) -> None:
    """After ``cancel``, ``finish`` is not called any more, whether the request waited or was on the device."""
    runner = make_runner(max_batch_size=1, held=True)
    async with running_engine(runner) as engine:
        outcomes: list[Outcome] = []
        on_device = engine.submit(images(1), LATER, outcomes.append)
        waiting = engine.submit(images(2), LATER, outcomes.append)
        await runner.until_batches(1)
        engine.cancel(on_device)
        engine.cancel(waiting)
        engine.cancel(waiting)
        assert engine.status().queue_depth == 0
        runner.open()
        await until(lambda: not engine.longest_running_s)
    assert outcomes == []
    assert runner.batches == [[1]]


async def test_an_expired_request_never_reaches_the_device(make_runner: MakeRunner) -> None:
    """A request whose deadline passes while it waits ends then, with DeadlineExceeded, and is not run."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        first = ask(engine, 0)
        await runner.until_batches(1)
        late, other = ask(engine, 1, deadline=time.monotonic() + 0.02), ask(engine, 2)
        with pytest.raises(DeadlineExceeded):
            await late
        assert engine.status().queue_depth == 1
        runner.open()
        await asyncio.gather(first, other)
    assert runner.batches == [[0], [2]]


async def test_a_batch_never_begins_with_a_late_request(make_runner: MakeRunner) -> None:
    """A deadline that passes before its timer can go off still keeps the request off the device."""
    runner = make_runner()
    async with running_engine(runner) as engine:
        deadline = time.monotonic() + 0.01
        late, other = ask(engine, 1, deadline=deadline), ask(engine, 2)
        while time.monotonic() < deadline:
            time.sleep(0.001)  # the event loop stands still
        with pytest.raises(DeadlineExceeded):
            await late
        await other
    assert runner.batches == [[2]]


async def test_a_hanging_device_keeps_nobody_beyond_the_deadline(make_runner: MakeRunner) -> None:
    """``submit`` alone ends a request on a hanging device at its deadline, once; the device's late result is dropped."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        outcomes: list[Outcome] = []
        engine.submit(images(1), time.monotonic() + 0.05, outcomes.append)
        await runner.until_batches(1)
        await until(lambda: bool(outcomes))
        assert engine.longest_running_s > 0
        runner.open()
        assert numbers_of((await predict(engine, images(2), LATER)).probabilities) == [2]
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded]


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(make_runner: MakeRunner) -> None:
    """A deadline before the backlog's end, or in the past, is refused without a place in the queue."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        with pytest.raises(DeadlineExceeded):
            await predict(engine, images(9), time.monotonic() - 1)
        engine._load.images_per_s = 1.0
        tasks = [ask(engine, *range(60))]
        await runner.until_batches(1)
        with pytest.raises(DeadlineExceeded):
            engine.submit(images(10), time.monotonic() + 30, lambda outcome: None)
        assert engine.status().queue_depth == 0
        runner.open()
        await asyncio.gather(*tasks)
    assert runner.batches == [list(range(60))]


async def test_a_failing_batch_fails_only_its_culprit(make_runner: MakeRunner) -> None:
    """One request that the device cannot take is found by halving the batch; all the others are answered."""
    runner = make_runner(held=True)
    runner.fails = lambda numbers: 5 in numbers
    async with running_engine(runner) as engine:
        tasks = [ask(engine, 0)]
        await runner.until_batches(1)
        tasks += [ask(engine, number) for number in range(1, 9)]
        runner.open()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        after = await predict(engine, images(20), LATER)
    assert runner.batches[:3] == [[0], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4]]
    assert isinstance(answers[5], InferenceFailed)
    assert numbers_of(after.probabilities) == [20]
    for number in (0, 1, 2, 3, 4, 6, 7, 8):
        answer = answers[number]
        assert isinstance(answer, Prediction)
        assert numbers_of(answer.probabilities) == [number]


async def test_a_device_out_of_memory_halves_the_batch(make_runner: MakeRunner) -> None:
    """A device that holds only three images at a time still answers every request of a larger batch."""
    runner = make_runner()
    runner.fails = lambda numbers: len(numbers) > 3
    async with running_engine(runner) as engine:
        answers = await asyncio.gather(*(ask(engine, number) for number in range(8)))
        assert engine.status().state == "ready"
    assert [numbers_of(answer.probabilities) for answer in answers] == [[number] for number in range(8)]
    assert runner.batches == [list(range(8)), [0, 1, 2, 3], [0, 1], [2, 3], [4, 5, 6, 7], [4, 5], [6, 7]]


async def test_a_device_that_takes_nothing_fails_the_batch_by_halves() -> None:
    """A batch that a polled device refuses to begin is run again in halves, away from the event loop."""
    runner = PolledFakeRunner()
    runner.fails_at_once = lambda numbers: len(numbers) > 1
    async with running_engine(runner) as engine:
        answers = await asyncio.gather(*(ask(engine, number) for number in range(4)))
    assert [numbers_of(answer.probabilities) for answer in answers] == [[0], [1], [2], [3]]
    assert runner.batches == [[0, 1], [2, 3]]


@pytest.mark.parametrize("base", [FakeRunner, PolledFakeRunner])
async def test_a_wrong_number_of_answers_is_a_failure(base: MakeRunner) -> None:
    """A runner that answers fewer images than it got fails the request and never mixes up answers."""

    class ForgetfulRunner(base):  # type: ignore[misc,valid-type]  # either
        def run(self, images: np.ndarray, stream: int = 0) -> np.ndarray:
            answers: np.ndarray = super().run(images, stream)
            return answers[1:] if len(answers) > 1 else answers

    async with running_engine(ForgetfulRunner()) as engine:
        answers = await asyncio.gather(*(ask(engine, number) for number in range(4)))
        assert [numbers_of(answer.probabilities) for answer in answers] == [[0], [1], [2], [3]]
        with pytest.raises(InferenceFailed):
            await predict(engine, images(4, 5), LATER)


async def test_one_bad_image_sent_again_and_again_does_not_kill_the_engine(make_runner: MakeRunner) -> None:
    """Requests that fail alone, one after the other, do not count as a dead device, which fails known images too."""
    runner = make_runner()
    runner.fails = lambda numbers: 13 in numbers
    async with running_engine(runner) as engine:
        for _ in range(10):
            with pytest.raises(InferenceFailed):
                await predict(engine, images(13), LATER)
        assert engine.status().state == "ready"
        assert numbers_of((await predict(engine, images(1), LATER)).probabilities) == [1]


async def test_a_dead_device_fails_what_waits_with_not_ready(make_runner: MakeRunner) -> None:
    """After several batches failed whole, the engine is failed: what waits and what comes gets NotReady at once."""
    runner = make_runner(max_batch_size=2, held=True)
    runner.fails = lambda numbers: True
    async with running_engine(runner) as engine:
        tasks = [ask(engine, 2 * number, 2 * number + 1) for number in range(6)]
        await runner.until_batches(1)
        assert engine.status().state == "ready"
        runner.open()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.status().state == "failed"
        assert engine.status().queue_depth == 0
        with pytest.raises(NotReady):
            await predict(engine, images(50), LATER)
    kinds = [type(answer) for answer in answers]
    assert kinds.count(InferenceFailed) + kinds.count(NotReady) == 6
    assert kinds[:3] == [InferenceFailed] * 3
    assert kinds[-1] is NotReady


async def test_an_idle_device_is_checked_with_a_known_image(make_runner: MakeRunner) -> None:
    """Nothing is checked while the device has just proved itself; an idle one gets the known image, on every stream."""
    runner = make_runner(streams=2)
    async with running_engine(runner) as engine:
        await predict(engine, images(1), LATER)
        engine.check_if_idle(3600)
        assert engine.longest_running_s == 0
        engine.check_if_idle(0)
        await runner.until_batches(3)
        await until(lambda: not engine.longest_running_s)
    assert runner.batches == [[1], [KNOWN], [KNOWN]]
    assert sorted(runner.streams_taken[1:]) == [0, 1]


async def test_a_device_that_hangs_while_idle_shows(make_runner: MakeRunner) -> None:
    """A check that does not come back counts as time on the device; requests wait behind it and are answered after it."""
    runner = make_runner(held=True)
    async with running_engine(runner) as engine:
        engine.check_if_idle(0)
        await runner.until_batches(1)
        assert engine.longest_running_s > 0
        task = ask(engine, 1)
        runner.open()
        assert numbers_of((await task).probabilities) == [1]


async def test_a_device_that_dies_while_idle_fails_the_engine(make_runner: MakeRunner) -> None:
    """Known images that fail, time after time, make the engine failed although nobody asked for anything."""
    runner = make_runner()
    runner.fails = lambda numbers: True
    async with running_engine(runner) as engine:
        for checks in range(1, 4):
            assert engine.status().state == "ready"
            engine.check_if_idle(0)
            await runner.until_batches(checks)
            await until(lambda: not engine.longest_running_s)
        assert engine.status().state == "failed"


async def test_close_fails_what_waits_and_what_runs(make_runner: MakeRunner) -> None:
    """The end of the engine ends every request with NotReady; the late answer of the device changes nothing."""
    runner = make_runner(max_batch_size=1, held=True)
    async with running_engine(runner) as engine:
        tasks = [ask(engine, 1), ask(engine, 2)]
        await runner.until_batches(1)
        engine.close()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [NotReady, NotReady]
    assert runner.batches == [[1]]


async def test_a_swapped_model_serves_from_the_next_batch_on(make_runner: MakeRunner) -> None:
    """The batch on the device ends on the old model and says so; what waited runs on the new one and says so."""
    old, new = make_runner(held=True, mark=1), make_runner(mark=2)
    async with running_engine(old) as engine:
        before = ask(engine, 1)
        await old.until_batches(1)
        waiting = ask(engine, 2)
        engine.swap(fake_model(new, "ba9876543210"))
        model = engine.status().model
        assert model is not None
        assert model.version == "ba9876543210"
        old.open()
        first, second = await asyncio.gather(before, waiting)
    assert (first.model.version, mark_of(first.probabilities)) == ("0123456789ab", 1)
    assert (second.model.version, mark_of(second.probabilities)) == ("ba9876543210", 2)
    assert (old.batches, new.batches) == ([[1]], [[2]])


async def test_an_idle_engine_lets_go_of_the_model_it_served_before(make_runner: MakeRunner) -> None:
    """Its memory is returned when it is replaced, not when the next request comes."""
    old = make_runner()
    gone = weakref.ref(old)
    async with running_engine(make_runner()) as engine:
        engine.swap(fake_model(old))
        await predict(engine, images(1), LATER)
        engine.swap(fake_model(make_runner()))
        del old
        await until(lambda: gone() is None)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((0, 3, 32, 32), np.uint8),
        np.zeros((3, 32, 32), np.uint8),
        np.zeros((1, 3, 31, 32), np.uint8),
        np.zeros((1, 3, 32, 32), np.float32),
        np.zeros((65, 3, 32, 32), np.uint8),
    ],
    ids=["none", "no batch axis", "other size", "other type", "too many"],
)
async def test_images_of_another_shape_are_refused_at_the_door(make_runner: MakeRunner, wrong: np.ndarray) -> None:
    """Only uint8 (1..max_batch_size, 3, size, size) is accepted."""
    async with running_engine(make_runner()) as engine:
        with pytest.raises(ValueError, match="a request is uint8"):
            await predict(engine, wrong, LATER)


async def test_batches_are_reported_with_their_size(make_runner: MakeRunner) -> None:
    """``on_batch`` hears the images of each batch that ran."""
    reported: list[int] = []
    async with running_engine(make_runner(), on_batch=lambda size, compute_s: reported.append(size)) as engine:
        await asyncio.gather(*(ask(engine, number) for number in range(3)))
        await predict(engine, images(4, 5), LATER)
    assert reported == [3, 2]


async def test_the_time_on_the_device_is_told_apart_from_the_wait(make_runner: MakeRunner) -> None:
    """The first of two batches waits for nobody, the second for the first: queue and compute add up."""
    runner = make_runner(max_batch_size=1, held=True)
    async with running_engine(runner) as engine:
        assert engine.longest_running_s == 0
        tasks = [ask(engine, 1), ask(engine, 2)]
        await runner.until_batches(1)
        assert engine.longest_running_s > 0
        runner.open()
        first, second = await asyncio.gather(*tasks)
        assert engine.longest_running_s == 0
    assert second.queue_s >= first.compute_s > 0
