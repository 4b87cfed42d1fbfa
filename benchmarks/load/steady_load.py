"""Clients that ask for predictions at a constant pace, and judge how every request ended.

A request is answered, properly refused, or lost.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from benchmarks.load.http_connection import HttpAnswer, HttpConnection, NoAnswer
from benchmarks.load.uploads import http_request

_HANG_S = 30.0  # far beyond every deadline of the service
_PATIENCE_S = 120.0
_UNREACHABLE_PAUSE_S = 0.05
_REFUSALS = {429: {"overloaded"}, 503: {"not_ready"}, 504: {"deadline_exceeded"}}


@dataclass(frozen=True)
class Sample:
    """An encoded image, and the label that the undisturbed service gives it."""

    image: bytes
    label: str


@dataclass(frozen=True)
class Loss:
    """A request that must not end like this; ``port`` is the client's own."""

    reason: str
    port: int


class SteadyLoad:
    """``clients`` connections to ``url``, kept alive, each with a request every ``pause_s`` or as soon as it can.

    Runs in the ``async with`` block; when that ends, what is on its way is waited for.
    """

    def __init__(
        self, url: str, samples: list[Sample], *, clients: int, pause_s: float = 0.0, until_unreachable: bool = False
    ) -> None:
        self._url = url
        self._samples = itertools.cycle(samples)
        self._clients = clients
        self._pause_s = pause_s
        self._until_unreachable = until_unreachable
        self._numbers = itertools.count(1)
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.sent = self.answered = self.unreachable = 0
        self.refused: Counter[int] = Counter()
        self.lost: list[Loss] = []
        self.versions: set[str] = set()
        self.slowest_answer_s = 0.0

    async def __aenter__(self) -> Self:
        """Start asking, and wait until every client has had an answer."""
        self._tasks = [asyncio.create_task(self._ask(index)) for index in range(self._clients)]
        await self.wait_for_more(self._clients)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ask no more, and wait for what is on its way."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def wait_for_more(self, answers: int) -> None:
        """Wait until that many more requests were answered; raise AssertionError after two minutes."""
        wanted = self.answered + answers
        await self.wait_until(lambda: self.answered >= wanted)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; raise AssertionError after two minutes."""
        limit = time.monotonic() + _PATIENCE_S
        while not condition():
            assert time.monotonic() < limit, f"it never came true; {self.answered} of {self.sent} requests were answered"
            await asyncio.sleep(0.02)

    async def _ask(self, index: int) -> None:
        connection: HttpConnection | None = None
        due = time.monotonic() + self._pause_s * index / self._clients
        while not self._stopping:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + self._pause_s, time.monotonic())
            if connection is not None and not connection.is_open:
                await connection.close()
                connection = None
            try:
                connection = connection or await HttpConnection.open(self._url)
            except OSError:
                self.unreachable += 1
                if self._until_unreachable:
                    return
                await asyncio.sleep(_UNREACHABLE_PAUSE_S)
                continue
            await self._exchange(connection, next(self._samples))
        if connection is not None:
            await connection.close()

    async def _exchange(self, connection: HttpConnection, sample: Sample) -> None:
        request_id = f"load-{next(self._numbers)}"
        request = http_request("POST", "/predict", sample.image, "image/png", {"x-request-id": request_id})
        self.sent += 1
        began = time.monotonic()
        try:
            answer = await connection.exchange(request, patience_s=_HANG_S)
        except NoAnswer as error:
            self.lost.append(Loss(str(error), connection.local_port))
            return
        wrong = judge(answer, request_id, sample)
        if wrong:
            self.lost.append(Loss(wrong, connection.local_port))
        elif answer.status == 200:
            self.answered += 1
            self.versions.add(json.loads(answer.body)["model"]["version"])
            self.slowest_answer_s = max(self.slowest_answer_s, time.monotonic() - began)
        else:
            self.refused[answer.status] += 1


def judge(answer: HttpAnswer, request_id: str, sample: Sample) -> str:
    """Say what is wrong with an answer to ``request_id``; empty for the right label and for a proper refusal."""
    try:
        content = json.loads(answer.body)
    except ValueError:
        return f"status {answer.status} with a body that is not JSON"
    if answer.headers.get("x-request-id") != request_id:
        return f"status {answer.status} for request {answer.headers.get('x-request-id')} instead of {request_id}"
    if answer.status == 200:
        return "" if content.get("label") == sample.label else f"{content.get('label')} for an image of {sample.label}"
    if content.get("code") not in _REFUSALS.get(answer.status, ()):
        return f"status {answer.status} with code {content.get('code')}"
    if content.get("status") != answer.status or content.get("request_id") != request_id:
        return f"status {answer.status} with a problem of another request"
    if answer.status in (429, 503) and not answer.headers.get("retry-after", "").isdigit():
        return f"status {answer.status} without Retry-After"
    return ""
