"""One exchange on a hot route: read the body within its limits, work while the client waits, write the answer or the error.

Owns: what every hot route does the same way: the deadline, the client that leaves, errors, the request's id. Does not know:
what is asked and answered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import InvalidParameter, MalformedRequest, ServiceError
from service.observability.request_id import request_id_of
from service.routes.context import ServiceContext
from service.web.asgi_exchange import header, read_body
from service.web.client_presence import ClientLeft, while_client_stays
from service.web.problems import error_response, internal_error

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Reply:
    """The answer of a request that went well; ``headers`` beside its type, length and the request's id."""

    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content_type: bytes = b"application/json"

    def all_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Give all that the answer to the request of ``scope`` is sent with."""
        return [
            *self.headers,
            (b"content-type", self.content_type),
            (b"content-length", b"%d" % len(self.body)),
            (b"x-request-id", request_id_of(scope).encode()),
        ]


# Takes the request, its whole body and the ``time.monotonic()`` by which the answer is due, in seconds.
Handle = Callable[[Scope, bytes, float], Coroutine[Any, Any, Reply]]


async def respond(context: ServiceContext, scope: Scope, receive: Receive, send: Send, handle: Handle) -> None:
    """Run ``handle``, translate what it raises, and write the answer unless the client has left."""
    try:
        reply = await _until_client_leaves(context, scope, receive, handle)
    except ClientLeft:
        logger.debug("client left request_id=%s", request_id_of(scope))
        return
    except Exception as error:
        await refusal(error, scope)(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": reply.all_headers(scope)})
    await send({"type": "http.response.body", "body": reply.body})


def refusal(error: Exception, scope: Scope) -> Response:
    """Make the answer to a request that failed; an error of no kind that we know is logged, and says nothing to the client."""
    if isinstance(error, ServiceError):
        return error_response(error, scope)
    logger.error("request failed path=%s request_id=%s", scope["path"], request_id_of(scope), exc_info=error)
    return error_response(internal_error(), scope)


async def _until_client_leaves(context: ServiceContext, scope: Scope, receive: Receive, handle: Handle) -> Reply:
    """Read the body, then work on it for as long as somebody waits for the answer."""
    body = await read_body(scope, receive, context.settings.max_body_bytes)
    return await while_client_stays(scope, receive, handle(scope, body, deadline_of(context, scope)))


def deadline_of(context: ServiceContext, scope: Scope) -> float:
    """Give the ``time.monotonic()`` by which the answer is due; it counts from the complete body's arrival.

    Raises MalformedRequest and InvalidParameter for an ``X-Request-Timeout-Ms`` that says no time.
    """
    limit_s = context.settings.request_timeout_s
    asked = header(scope, b"x-request-timeout-ms")
    if asked is None:
        return time.monotonic() + limit_s
    try:
        asked_s = float(asked) / 1e3
    except ValueError:
        raise MalformedRequest("X-Request-Timeout-Ms is not a number; send milliseconds") from None
    if not asked_s > 0:
        raise InvalidParameter("X-Request-Timeout-Ms must be above 0")
    return time.monotonic() + min(limit_s, asked_s)
