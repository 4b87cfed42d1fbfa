"""What every request passes, in this order: record, CORS, key, rate limit, deadline, route.

Requests about images then pass the admission gate, see ``service.routes.classification``.
"""

from __future__ import annotations

import logging
import time
from functools import partial

from service.answers import number
from service.errors import InvalidParameter, MalformedRequest, ServiceError
from service.observability.metrics import METRICS_PATH
from service.observability.request_record import Scope
from service.observability.shared_values import Facts
from service.observability.telemetry import Telemetry
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.client_address import TrustedProxies, caller_at
from service.web.content_encoding import decompressed
from service.web.cors import Cors
from service.web.exchange import Exchange, Reply, handle, without_prefix
from service.web.memory_budget import MemoryBudget
from service.web.rate_limit import open_rate_limiter
from service.web.route import RouteTable

logger = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health"})
_ADMIN_PREFIX = "/admin/"  # has a key of its own
_OPEN_PREFIXES = ("/health/", "/v2/health/", "/page/", _ADMIN_PREFIX)
_UNLIMITED_PATHS = frozenset({METRICS_PATH, "/labels", "/samples"})  # what Prometheus and the page ask for by themselves


class Entry:
    """The way in to ``routes``; see ``service.web.exchange.Entrance``."""

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        api_keys: ApiKeys,
        supervisor: Facts,
        memory: MemoryBudget,
        routes: RouteTable,
    ) -> None:
        self.max_body_bytes = settings.max_body_bytes
        self.memory = memory
        self._timeout_s = settings.request_timeout_s
        self._root_path = settings.root_path.rstrip("/")
        self._telemetry = telemetry
        self._api_keys = api_keys
        self._admin_keys = ApiKeys(settings.admin_key.get_secret_value())
        self._supervisor = supervisor
        self._routes = routes
        self._proxies = TrustedProxies(settings.trusted_proxies) if settings.trusted_proxies else None
        self._cors = Cors(settings.cors_origins) if settings.cors_origins else None
        self._rate_limiter = open_rate_limiter(settings)
        self._asks_who = api_keys.required or self._rate_limiter is not None

    def open(self, exchange: Exchange) -> None:
        """See ``Entrance``; a count that another machine keeps is awaited, and the exchange released afterwards."""
        scope = exchange.scope
        if self._root_path:
            scope.path = without_prefix(scope.path, self._root_path)
        if self._proxies is not None:
            self._proxies.find_client(scope)
        exchange.record = self._telemetry.begin(scope)
        try:
            if self._cors is not None and (preflight := self._cors.preflight(scope)) is not None:
                exchange.answer(preflight)
                return
            if self._asks_who and is_protected(scope.path):
                caller = self._api_keys.caller(scope) if self._api_keys.required else None
                if self._rate_limiter is not None and scope.path not in _UNLIMITED_PATHS:
                    self._rate_limiter.check(exchange, caller or caller_at(scope.client))
                    return
            elif self._admin_keys.required and scope.path.startswith(_ADMIN_PREFIX):
                self._admin_keys.caller(scope)
        except ServiceError as error:
            exchange.refuse(error)
            return
        exchange.release()

    def route(self, exchange: Exchange) -> None:
        """See ``Entrance``."""
        scope = exchange.scope
        try:
            route = self._routes.find(exchange.record)
            if scope.query:
                scope.params |= route.read_query(scope.query)
            handler = route.handler
            if scope.method == "POST":
                exchange.deadline = self._deadline_of(scope)
                encoding = scope.header(b"content-encoding")
                if encoding is not None and exchange.body:
                    handler = partial(decompressed, handler, encoding)
            handle(exchange, handler)
        except Exception as error:
            exchange.refuse(error)

    def close(self, exchange: Exchange, reply: Reply | None) -> None:
        """See ``Entrance``; while the service drains, clients are sent elsewhere with their next request."""
        record = exchange.record
        if reply is not None:
            record.status = reply.status
            reply.headers.append((b"x-request-id", exchange.scope.request_id.encode()))
            if self._cors is not None:
                self._cors.allow(exchange.scope, reply)
            if self._supervisor.draining:
                exchange.keep_alive = False
        else:
            logger.debug("client left request_id=%s", exchange.scope.request_id)
        self._telemetry.end(record, [] if reply is None else reply.headers)

    def _deadline_of(self, scope: Scope) -> float:
        """``time.monotonic()`` by which the answer is due, in seconds; it counts from the arrival of the whole body.

        Raises MalformedRequest and InvalidParameter for an ``X-Request-Timeout-Ms`` that is no time.
        """
        asked = scope.header(b"x-request-timeout-ms")
        if asked is None:
            return time.monotonic() + self._timeout_s
        if (asked_ms := number(asked.decode("latin-1"))) is None:
            raise MalformedRequest("X-Request-Timeout-Ms is not a number; send milliseconds")
        if asked_ms <= 0:
            raise InvalidParameter("X-Request-Timeout-Ms must be above 0")
        return time.monotonic() + min(self._timeout_s, asked_ms / 1e3)


def is_protected(path: str) -> bool:
    """Whether keys and the rate limit apply to ``path``: to all but health and what a browser loads first."""
    return path not in _OPEN_PATHS and not path.startswith(_OPEN_PREFIXES)
