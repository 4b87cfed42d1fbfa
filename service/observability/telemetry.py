"""One layer around the whole application: every request's record is begun here, and told when the answer is complete.

Owns: the moment of telling, and the path's template. Does not know: what is done with the record by metrics, the access log
and the tracer. What a request does is told before the last bytes of its answer are sent, so whoever has an answer finds it
counted. Scrapes of ``/metrics`` are left out: they would only measure themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability.access_log import AccessLog
from service.observability.metrics import OTHER, Metrics
from service.observability.request_record import RequestRecord, begin_record, end_record
from service.observability.tracing import Tracer
from service.routes.metrics import PATH as METRICS_PATH


class Telemetry:
    """An ASGI layer over ``app``, whose ``routes`` are the templates of its paths."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Sequence[str], access_log: AccessLog | None, tracer: Tracer | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._access_log = access_log
        self._tracer = tracer
        metrics.name_routes(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["path"] == METRICS_PATH:
            await self._app(scope, receive, send)
            return
        record = self.begin(scope)

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if self._tracer is not None:
                    message["headers"] = [*message["headers"], *self._tracer.headers(record)]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                self.end(record)
            await send(message)

        try:
            await self._app(scope, receive, send_told)
        except Exception:
            if record.status is None:
                record.status = 500  # the server around this application answers so
            raise
        finally:
            self.end(record)

    def begin(self, scope: Scope) -> RequestRecord:
        """Begin the record of a request, which ``end`` tells; for requests that come without ASGI too."""
        record = begin_record(scope)
        self._metrics.request_began()
        if self._tracer is not None:
            self._tracer.begin(record)
        return record

    def end(self, record: RequestRecord) -> None:
        """Tell the record, once."""
        if record.told:
            return
        record.told = True
        record.ended = time.monotonic()
        record.route = self._route(record.scope)
        self._metrics.observe_request(record)
        if self._access_log is not None:
            self._access_log.write(record)
        if self._tracer is not None:
            self._tracer.end(record)
        end_record(record)

    def _route(self, scope: Scope) -> str:
        path: str = scope["path"]
        if path in self._routes:
            return path
        template = getattr(scope.get("route"), "path", OTHER)
        return template if template in self._routes else OTHER
