"""What of an answer goes out together, on the sockets of a real event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.web.answer_transport import AnswerTransport, Outbox

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops write at once when the socket takes it."""
    return "asyncio", {"use_uvloop": request.param}


@asynccontextmanager
async def connected(outbox: Outbox) -> AsyncIterator[tuple[AnswerTransport, socket.socket]]:
    """Yield a transport and the client's end, which never blocks."""
    ours, client = socket.socketpair()
    client.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    with client:
        yield AnswerTransport(transport, outbox), client
        transport.abort()
        await turns()


def received(client: socket.socket) -> bytes:
    """Return what lies at the client; nothing where nothing was sent yet."""
    try:
        return client.recv(65_536)
    except BlockingIOError:
        return b""


async def turns(number: int = 2) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_whole_answers_of_a_turn_go_out_at_its_end() -> None:
    """Nothing leaves while others may be made; then everything of everyone does, in order on each connection."""
    outbox = Outbox()
    async with connected(outbox) as (first, first_client), connected(outbox) as (second, second_client):
        first.write_whole(HEAD + b"1a")
        second.write_whole(HEAD + b"2a")
        first.write_whole(HEAD + b"1b")
        assert received(first_client) == received(second_client) == b""
        await turns()
        assert received(first_client) == HEAD + b"1a" + HEAD + b"1b"
        assert received(second_client) == HEAD + b"2a"
        second.write_whole(HEAD + b"2b")  # a later turn has its own end
        await turns()
        assert received(second_client) == HEAD + b"2b"


async def test_who_has_left_holds_up_nobody() -> None:
    """An answer for a closed connection is dropped, the next one's goes out."""
    outbox = Outbox()
    async with connected(outbox) as (first, _), connected(outbox) as (second, client):
        first.write_whole(HEAD + b"1a")
        second.write_whole(HEAD + b"2a")
        first.abort()
        await turns()
        assert received(client) == HEAD + b"2a"


async def test_a_head_goes_out_with_the_first_of_its_body() -> None:
    """A head waits for what follows it, however many turns later; what follows the first of the body does not wait."""
    async with connected(Outbox()) as (transport, client):
        transport.write(HEAD)
        await turns()
        assert received(client) == b""
        transport.write(b"o")
        assert received(client) == HEAD + b"o"
        transport.write(b"k")
        assert received(client) == b"k"


async def test_the_leave_to_send_a_body_waits_for_nothing() -> None:
    """After 100 Continue it is the client's turn."""
    async with connected(Outbox()) as (transport, client):
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert received(client) == b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_closing_sends_what_is_held_back() -> None:
    """An answer that is whole, and a head without a body, leave before the end."""
    async with connected(Outbox()) as (transport, client):
        transport.write_whole(HEAD + b"ok")
        transport.close()
        await turns()
        assert received(client) == HEAD + b"ok"
        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
    async with connected(Outbox()) as (transport, client):
        transport.write(HEAD)
        transport.close()
        await turns()
        assert received(client) == HEAD
        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
