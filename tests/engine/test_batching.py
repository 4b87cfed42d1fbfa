"""The batching policy, by its own table and by what must hold for all that waits and runs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.batching import Batching

CPU = Batching(streams=3, efficient_batch=8, sizes=(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 64), lone=True)
GPU = Batching(streams=2, efficient_batch=64, sizes=(1, 2, 4, 8, 16, 32, 64))


def worked_cases() -> list[tuple[str, ...]]:
    """The rows of the table in the docstring of ``Batching``."""
    assert Batching.__doc__ is not None
    table = Batching.__doc__.split("=\n")[2]
    return [tuple(re.split(r"\s{2,}", line.strip())) for line in table.splitlines() if line.strip("= ")]


def waiting_of(cell: str) -> list[int]:
    """The images of each waiting request: ``3 x 1`` or ``2, 20``."""
    if " x " in cell:
        count, images = cell.split(" x ")
        return [int(images)] * int(count)
    return [int(images) for images in cell.replace("-", "").split(",") if images]


def running_of(cell: str) -> dict[int, int]:
    """The images on each busy stream: ``8 on 1`` or ``8, 8``, which are on the streams 0 and 1."""
    batches = (batch.split(" on ") for batch in cell.replace("-", "").split(",") if batch)
    return {int(batch[1]) if len(batch) > 1 else stream: int(batch[0]) for stream, batch in enumerate(batches)}


@pytest.mark.parametrize("case", worked_cases(), ids=lambda case: "; ".join(case[:3]))
def test_the_worked_cases_hold(case: tuple[str, ...]) -> None:
    """Each row of the documented table is what the policy decides."""
    waiting, running = waiting_of(case[0]), running_of(case[1])
    choice = CPU.choose(waiting, sum(waiting), running)
    assert ("-" if choice is None else f"{sum(waiting[: choice[0]])} on {choice[1]}") == case[2]


def test_there_are_about_ten_worked_cases() -> None:
    """The table is found in the docstring."""
    assert len(worked_cases()) >= 10


@pytest.mark.parametrize(("waiting", "running", "choice"), [(5, {}, (5, 0)), (63, {0: 5}, None), (64, {0: 5}, (64, 1))])
def test_a_second_stream_of_a_gpu_begins_full_batches_only(
    waiting: int, running: dict[int, int], choice: tuple[int, int] | None
) -> None:
    """An idle GPU takes all that waits; while it computes, only a full batch begins on the second stream."""
    assert GPU.choose([1] * waiting, waiting, running) == choice


@given(
    waiting=st.lists(st.integers(1, 64), max_size=80),
    running=st.dictionaries(st.integers(0, 2), st.integers(0, 64), max_size=3),
    efficient_batch=st.integers(1, 64),
    lone=st.booleans(),
)
def test_no_stream_idles_while_an_efficient_batch_waits(
    waiting: list[int], running: dict[int, int], efficient_batch: int, lone: bool
) -> None:
    """A batch begins on an idle stream exactly if the device is idle or enough waits; it has a request and fits."""
    batching = Batching(3 + lone, efficient_batch, GPU.sizes, lone)
    choice = batching.choose(waiting, sum(waiting), running)
    assert (choice is not None) == (len(running) < 3 and bool(waiting) and (not running or sum(waiting) >= efficient_batch))
    if choice is not None:
        count, stream = choice
        assert count > 0
        assert sum(waiting[:count]) <= 64
        assert stream in {0, 1, 2} - running.keys() or (
            lone and stream == 3 and not running and sum(waiting) < 2 * efficient_batch
        )
