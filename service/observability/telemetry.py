"""Reports every request's record to metrics, access log and tracer, just before the response is sent.

So a client that has its response finds it counted. Scrapes of ``/metrics`` are not reported: they would measure themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from service.observability.access_log import AccessLog
from service.observability.metrics import METRICS_PATH, OTHER, Metrics
from service.observability.request_record import RequestRecord, Scope
from service.observability.tracing import Tracer

logger = logging.getLogger(__name__)


class Telemetry:
    """Observes requests to ``routes``, which are path templates; all other paths are counted together."""

    def __init__(self, metrics: Metrics, routes: Sequence[str], access_log: AccessLog | None, tracer: Tracer | None) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._tracer = tracer
        metrics.name_routes(routes)

    def begin(self, scope: Scope) -> RequestRecord:
        """Begin the record of a request, which ``end`` reports."""
        record = RequestRecord(scope)
        record.reported = scope.path == METRICS_PATH
        if not record.reported:
            self._metrics.request_began()
            if self._tracer is not None:
                self._tracer.begin(record)
        return record

    def end(self, record: RequestRecord, headers: list[tuple[bytes, bytes]]) -> None:
        """Report the record, once, and add to the response's ``headers`` those that name its trace."""
        if record.reported:
            return
        record.reported = True
        record.ended = time.monotonic()
        route = record.route or record.scope.path
        record.route = route if route in self._metrics.routes else OTHER
        try:
            self._metrics.observe_request(record)
            if self._access_log is not None:
                self._access_log.write(record)
            if self._tracer is not None:
                headers += self._tracer.end(record)
        except Exception:  # a fault in reporting costs no response
            logger.exception("request not reported request_id=%s", record.scope.request_id)
