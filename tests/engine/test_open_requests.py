"""Open requests end exactly once, at their deadline at the latest, on one timer."""

from __future__ import annotations

import math
import time

import pytest

from service.engine.interface import OpenRequests, Request
from service.errors import DeadlineExceeded, NotReady
from tests.support.fake_runner import images
from tests.support.patience import until

pytestmark = pytest.mark.anyio

FAR_S = 3600.0


class Opened:
    """Open requests, what each got, whether it was really late then, and which were withdrawn."""

    def __init__(self) -> None:
        self.requests = OpenRequests(self.withdraw)
        self.outcomes: list[tuple[str, str]] = []
        self.withdrawn: list[str] = []
        self._names: dict[Request, str] = {}

    def add(self, name: str, deadline: float) -> Request:
        """Open a request of two images; its outcomes are noted by their type."""

        def finish(outcome: object) -> None:
            assert not isinstance(outcome, DeadlineExceeded) or time.monotonic() >= deadline
            self.outcomes.append((name, type(outcome).__name__))

        request = Request(images(1, 2), deadline, finish)
        self._names[request] = name
        self.requests.add(request)
        return request

    def withdraw(self, request: Request) -> None:
        """Note an expired request, which has not been finished yet."""
        assert request in self.requests
        self.withdrawn.append(self._names[request])


async def test_each_expires_at_its_deadline_in_order() -> None:
    """The order in which they came does not matter, nor a first one that is far off; each is withdrawn before."""
    opened, now = Opened(), time.monotonic()
    for name, after_s in (("far", FAR_S), ("b", 0.04), ("a", 0.01), ("c", 0.08)):
        opened.add(name, now + after_s)
    await until(lambda: len(opened.outcomes) == 3)
    assert opened.outcomes == [(name, "DeadlineExceeded") for name in "abc"]
    assert opened.withdrawn == ["a", "b", "c"]
    assert len(opened.requests) == 1


async def test_what_has_ended_does_not_expire() -> None:
    """The timer that was set for ended requests goes off for nobody, and is set again for the one that is open."""
    opened, now = Opened(), time.monotonic()
    met, left = opened.add("met", now + 0.01), opened.add("left", now + 0.01)
    opened.add("late", now + 0.05)
    opened.requests.end(met.id, None)
    assert opened.requests.remove(left.id) is left
    await until(lambda: len(opened.outcomes) == 2)
    assert opened.outcomes == [("met", "NoneType"), ("late", "DeadlineExceeded")]


async def test_a_request_ends_once() -> None:
    """Whatever comes after its first end is dropped."""
    opened = Opened()
    request = opened.add("one", math.inf)
    opened.requests.end(request.id, None)
    opened.requests.end(request.id, None)
    opened.requests.end_all(NotReady("over"))
    assert opened.requests.remove(request.id) is None
    assert opened.outcomes == [("one", "NoneType")]


async def test_a_past_deadline_expires_in_a_later_iteration() -> None:
    """Not within ``add``, whose caller is not done yet; ``expire`` ends it at once."""
    opened = Opened()
    opened.add("first", time.monotonic() - 1)
    assert opened.outcomes == []
    await until(lambda: bool(opened.outcomes))
    opened.add("second", time.monotonic() - 1)
    opened.requests.expire()
    assert [name for name, _ in opened.outcomes] == ["first", "second"]


async def test_images_and_the_end_of_all_are_known() -> None:
    """Images count while their request is open."""
    opened = Opened()
    first, _ = opened.add("first", math.inf), opened.add("second", math.inf)
    assert opened.requests.images == 4
    opened.requests.remove(first.id)
    assert opened.requests.images == 2
    opened.requests.end_all(NotReady("over"))
    assert opened.requests.images == 0
    assert opened.outcomes == [("second", "NotReady")]
