"""Many deadlines on one timer."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.engine.deadline_watch import DeadlineWatch

pytestmark = pytest.mark.anyio

FAR_S = 3600.0


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops: uvloop's clock counts milliseconds."""
    return "asyncio", {"use_uvloop": request.param}


class Waiting:
    """Notes its name, and whether it was really late, when it expires."""

    def __init__(self, name: str, deadline: float, expired: list[tuple[str, bool]]) -> None:
        self.name = name
        self.deadline = deadline
        self.expired = expired
        self.event = asyncio.Event()

    def expire(self) -> None:
        self.expired.append((self.name, time.monotonic() >= self.deadline))
        self.event.set()


async def test_each_expires_after_its_deadline_in_order() -> None:
    """Whatever the order in which they came, and with one far off from the beginning."""
    watch, now = DeadlineWatch(), time.monotonic()
    expired: list[tuple[str, bool]] = []
    waiting = [
        Waiting(name, now + after_s, expired) for name, after_s in (("far", FAR_S), ("b", 0.04), ("a", 0.01), ("c", 0.08))
    ]
    for what in waiting:
        watch.add(what, what.deadline)
    await waiting[3].event.wait()
    assert expired == [("a", True), ("b", True), ("c", True)]


async def test_what_is_removed_never_expires_and_the_others_do() -> None:
    """The timer that was set for the removed one goes off for nobody, and is set anew for the one that is left."""
    watch, now = DeadlineWatch(), time.monotonic()
    expired: list[tuple[str, bool]] = []
    met, late = Waiting("met", now + 0.01, expired), Waiting("late", now + 0.05, expired)
    watch.add(met, met.deadline)
    watch.add(late, late.deadline)
    watch.remove(met)
    watch.remove(met)
    await late.event.wait()
    assert expired == [("late", True)]


async def test_a_deadline_in_the_past_expires_in_a_later_turn() -> None:
    """Not within ``add``, whose caller is not done yet; and then again for the next."""
    watch = DeadlineWatch()
    expired: list[tuple[str, bool]] = []
    for name in ("first", "second"):
        past = Waiting(name, time.monotonic() - 1, expired)
        watch.add(past, past.deadline)
        assert (name, True) not in expired
        await past.event.wait()
    assert expired == [("first", True), ("second", True)]
