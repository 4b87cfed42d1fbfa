"""The application of one worker, put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import orjson

from service.cpu import available_cores, share_cores
from service.engine.interface import Engine
from service.observability.access_log import AccessLog
from service.observability.kept_images import KeptImages
from service.observability.metrics import FIRST_WORKER, SUPERVISOR, Metrics, make_values
from service.observability.telemetry import Telemetry
from service.observability.tracing import open_tracer
from service.routes.context import ServiceContext
from service.routes.decoder import Decoder
from service.routes.explain import explain_routes
from service.routes.hugging_face import hugging_face_routes
from service.routes.open_inference.routes import open_inference_routes
from service.routes.openapi import about, document
from service.routes.operations import operation_routes
from service.routes.page import page_routes
from service.routes.predict import predict_routes
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.asgi_exchange import AsgiCarrier
from service.web.entry import Entry
from service.web.exchange import Exchange, Reply
from service.web.memory_budget import MemoryBudget, default_budget_bytes
from service.web.route import Route, RouteTable


class Application(AsgiCarrier):
    """All routes over any engine, behind ``entry`` for any carrier; called, for any ASGI server."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        metrics: Metrics | None = None,
        keys: ApiKeys | None = None,
        change_model: Callable[[str], None] | None = None,
    ) -> None:
        """Count requests in ``metrics``, without it in a table of their own.

        ``keys`` are those of ``settings``, read before; for ``change_model`` see ``ServiceContext``.
        """
        shares = share_cores(available_cores(), workers=settings.workers, decode_threads=settings.decode_threads)
        memory = MemoryBudget(settings.memory_budget_bytes or default_budget_bytes(shares.workers))
        decoder = Decoder(threads=shares.decode_threads, max_waiting=settings.max_queue_images, memory=memory)
        metrics = metrics or Metrics(make_values(workers=1), FIRST_WORKER)
        keys = keys or ApiKeys(settings.api_keys.get_secret_value(), settings.api_keys_file)
        supervisor = metrics.values.facts(SUPERVISOR)
        kept = None
        if settings.keep_folder is not None:
            bounds = {"max_files": settings.keep_max_files, "max_bytes": settings.keep_max_bytes}
            kept = KeptImages(settings.keep_folder, below=settings.keep_below, **bounds)
        self.context = context = ServiceContext(settings, engine, decoder, metrics, change_model, kept)
        self._keys_required = keys.required
        self._routes = [
            Route("/openapi.json", self._document, any_query=True, include_in_schema=False),
            *predict_routes(context),
            *hugging_face_routes(context),
            *explain_routes(context),
            *operation_routes(context),
            *open_inference_routes(context),
            *page_routes(),
        ]
        table = RouteTable(self._routes)
        self._tracer = open_tracer(settings)
        is_logged = settings.access_log and settings.log_level in ("debug", "info")
        self._access_log = AccessLog(settings) if is_logged else None
        telemetry = Telemetry(metrics, table.paths, self._access_log, self._tracer)
        self.entry = Entry(settings, telemetry, keys, supervisor, memory, table)
        super().__init__(self.entry)

    @cached_property
    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, which is made once."""
        return document(self._routes, keys_required=self._keys_required, root_path=self.context.settings.root_path.rstrip("/"))

    def _document(self, _: Exchange) -> Reply:
        text, model = orjson.dumps(self.openapi), self.context.engine.model
        return Reply(text if model is None else about(text, model))

    def close(self) -> None:
        """Let the decoder's threads end, write the last log lines and send the last spans."""
        self.context.decoder.close()
        if self.context.kept is not None:
            self.context.kept.close()
        if self._access_log is not None:
            self._access_log.flush()
        if self._tracer is not None:
            self._tracer.close()
