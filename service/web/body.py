"""What is inside a request's body, read with bounded work: JSON by the number of its values, all that is large in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import orjson

from service.errors import MalformedRequest, deadline_passed
from service.web.exchange import Exchange

_P = ParamSpec("_P")
_T = TypeVar("_T")

LARGE_BODY_BYTES = 2**18  # reading this much takes 1 ms
_LIST_COST = 16  # of a list, an object or a member: reading it takes as much time and memory as this many numbers
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# One thread: reading mostly holds the interpreter's lock, and two would keep it from the event loop for longer.
_thread = ThreadPoolExecutor(1, thread_name_prefix="body")


async def read_body(exchange: Exchange, read: Callable[Concatenate[bytes, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return ``read(body, ...)``, and raise what it raises, or DeadlineExceeded; the exchange keeps no body."""
    body, exchange.body = exchange.body, b""  # it need not be kept while the request waits
    if len(body) <= LARGE_BODY_BYTES:
        return read(body, *args, **kwargs)
    return await in_thread(partial(read, body, *args, **kwargs), exchange.deadline)


async def in_thread(work: Callable[[], _T], deadline: float) -> _T:
    """Return ``work()``, from the thread that reads large bodies; raise DeadlineExceeded at ``deadline``."""
    return await until(deadline, asyncio.get_running_loop().run_in_executor(_thread, work))


async def until(deadline: float, future: asyncio.Future[_T]) -> _T:
    """Return the result of ``future``, which is cancelled at ``deadline``; raise DeadlineExceeded then."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await future
    except TimeoutError:
        raise deadline_passed() from None
    finally:
        del future  # a failed one holds its error, whose traceback has this frame: a cycle for the garbage collector


def load_json(body: bytes, *, max_cost: int, hint: str = "the body is not valid JSON") -> Any:
    """Return the document in ``body``; raise MalformedRequest, with ``hint`` where it is not valid JSON.

    A value costs 1, a list, an object or a member of one 16 more, and a document that costs more than ``max_cost`` is refused
    before it is read. What is like a value within a string counts too. The parser itself bounds the nesting, to 1,024.
    """
    if len(body) > max_cost and body.count(b",") + _LIST_COST * sum(map(body.count, (b"[", b"{", b":"))) > max_cost:
        raise MalformedRequest("the JSON has too many values; send the image in base64, or fewer images")
    try:
        return orjson.loads(body.removeprefix(_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        raise MalformedRequest(hint) from None
