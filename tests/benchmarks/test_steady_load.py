"""The judge of the fault runs: what it calls answered, properly refused and lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.load.http_connection import HttpAnswer
from benchmarks.load.steady_load import Sample, SteadyLoad, judge

_SAMPLE = Sample(b"image", "cat")
_ANSWER = {"label": "cat", "model": {"version": "1"}}
_PROBLEM = {"status": 429, "code": "overloaded", "request_id": "1"}


def answer(status: int, content: object, **headers: str) -> HttpAnswer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpAnswer(status, {"x-request-id": "1", **named}, json.dumps(content).encode())


@pytest.mark.parametrize(
    "proper",
    [
        answer(200, _ANSWER),
        answer(429, _PROBLEM, retry_after="2"),
        answer(503, {**_PROBLEM, "status": 503, "code": "not_ready"}, retry_after="1"),
        answer(504, {**_PROBLEM, "status": 504, "code": "deadline_exceeded"}),
    ],
)
def test_an_answer_and_a_proper_refusal_pass(proper: HttpAnswer) -> None:
    """The right label, and each refusal of the contract, are no loss."""
    assert judge(proper, "1", _SAMPLE) == ""


@pytest.mark.parametrize(
    "improper",
    [
        answer(200, {**_ANSWER, "label": "dog"}),
        answer(200, _ANSWER, x_request_id="2"),
        HttpAnswer(200, {"x-request-id": "1"}, b"half an ans"),
        answer(429, _PROBLEM),
        answer(429, {**_PROBLEM, "request_id": "2"}, retry_after="2"),
        answer(503, {**_PROBLEM, "status": 503}, retry_after="1"),
        answer(500, {**_PROBLEM, "status": 500, "code": "internal_error"}),
    ],
    ids=["label", "other request", "no JSON", "no Retry-After", "problem of another", "other code", "500"],
)
def test_anything_else_is_a_loss(improper: HttpAnswer) -> None:
    """Another image's label, another request's answer, a refusal that is not as the contract says."""
    assert judge(improper, "1", _SAMPLE) != ""


@asynccontextmanager
async def server(reply: Callable[[int, bytes], bytes | None]) -> AsyncIterator[str]:
    """A server that answers request number N with ``reply(N, its id)``, and closes the connection at None."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(_SAMPLE.image))
                request_id = next(line[14:] for line in head.split(b"\r\n") if line.startswith(b"x-request-id"))
                count += 1
                content = reply(count, request_id)
                if content is None:
                    break
                writer.write(content)
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def test_every_request_is_counted_once_and_a_closed_connection_is_a_loss() -> None:
    """A server that drops every third request costs exactly those, and the client goes on over a new connection."""

    def reply(number: int, request_id: bytes) -> bytes | None:
        body = json.dumps(_ANSWER).encode()
        head = f"HTTP/1.1 200 OK\r\nx-request-id: {request_id.decode()}\r\ncontent-length: {len(body)}\r\n\r\n"
        return None if number % 3 == 0 else head.encode() + body

    async def run() -> SteadyLoad:
        async with server(reply) as url, SteadyLoad(url, [_SAMPLE], clients=1) as load:
            await load.wait_until(lambda: load.sent >= 9)
        return load

    load = asyncio.run(run())
    assert len(load.lost) == load.sent // 3
    assert load.answered == load.sent - load.sent // 3
    assert load.versions == {"1"}
    assert load.unreachable == 0
