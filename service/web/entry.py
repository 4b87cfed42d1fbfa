"""The way into the application that has no task and no ASGI message on it: for requests about one image.

Owns: what the application's ASGI way does around a route: key, record, deadline, refusal, the client that leaves. Does not
know: the connection, what a route does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from service.errors import ServiceError
from service.observability.request_id import request_id_of
from service.observability.telemetry import Telemetry
from service.routes.context import ServiceContext
from service.routes.one_image import OneImageCall, OneImageEndpoint
from service.web.access import check_key
from service.web.direct_exchange import DirectExchange
from service.web.exchange import Reply, deadline_of, refusal

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 65_536  # a larger body wants flow control, which the ASGI way has


class DirectEntry:
    """Answers exchanges on the paths of ``routes``; see ``DirectRoutes``."""

    def __init__(self, context: ServiceContext, telemetry: Telemetry, routes: Mapping[str, OneImageEndpoint]) -> None:
        self.context = context
        self.telemetry = telemetry
        self.routes = dict(routes)
        self.paths = frozenset(path.encode() for path in routes)
        self.max_body_bytes = min(_MAX_BODY_BYTES, context.settings.max_body_bytes)

    def begin(self, exchange: DirectExchange) -> Callable[[bytes], None]:
        """See ``DirectRoutes``."""
        return _Passage(self, exchange).work


class _Passage:
    """One request's way through."""

    __slots__ = ("_call", "_entry", "_exchange", "_record")

    def __init__(self, entry: DirectEntry, exchange: DirectExchange) -> None:
        self._entry = entry
        self._exchange = exchange
        self._call: OneImageCall | None = None
        self._record = entry.telemetry.begin(exchange.scope)
        exchange.connection.on_lost = self._client_left

    def work(self, body: bytes) -> None:
        """Work on the request, whose whole ``body`` has come."""
        exchange, context = self._exchange, self._entry.context
        scope = exchange.scope
        if context.is_draining():  # clients take their next request elsewhere
            exchange.keep_alive = False
        try:
            check_key(context.api_keys, scope)
            deadline = deadline_of(context, scope)
        except ServiceError as error:
            self._finish(error)
            return
        self._call = OneImageCall(self._entry.routes[scope["path"]], scope, body, deadline, self._finish)
        self._call.begin()

    def _finish(self, outcome: Reply | Exception) -> None:
        """Answer; raise nothing, since whoever calls has others to call."""
        self._exchange.connection.on_lost = None
        self._call = None
        try:
            self._answer(outcome)
        except Exception:
            logger.exception("answer failed request_id=%s", request_id_of(self._exchange.scope))
            self._entry.telemetry.end(self._record)
            self._exchange.fail()

    def _answer(self, outcome: Reply | Exception) -> None:
        exchange, record = self._exchange, self._record
        if isinstance(outcome, Reply):
            record.status, headers, body = 200, outcome.all_headers(exchange.scope), outcome.body
        else:
            response = refusal(outcome, exchange.scope)
            record.status, headers, body = response.status_code, response.raw_headers, bytes(response.body)
        self._entry.telemetry.end(record)
        exchange.answer(record.status, headers, body)

    def _client_left(self) -> None:
        self._exchange.connection.on_lost = None
        if self._call is not None:
            self._call.cancel()
            self._call = None
        self._entry.telemetry.end(self._record)
