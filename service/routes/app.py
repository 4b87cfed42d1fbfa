"""The application of one worker, put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI
from starlette.types import Receive, Scope, Send

from service import __version__
from service.cpu import available_cores, share_cores
from service.engine.interface import Engine
from service.observability.access_log import AccessLog
from service.observability.kept_images import KeptImages
from service.observability.metrics import FIRST_WORKER, Metrics, make_values
from service.observability.telemetry import Telemetry
from service.observability.tracing import open_tracer
from service.routes.admin import admin_routes
from service.routes.context import ServiceContext
from service.routes.decoder import Decoder
from service.routes.explain import explain_routes
from service.routes.health import health_router
from service.routes.hugging_face import hugging_face_routes
from service.routes.metrics import metrics_router
from service.routes.open_inference.routes import infer_routes, open_inference_router
from service.routes.openapi import complete
from service.routes.page import page_router
from service.routes.predict import predict_routes
from service.settings import Settings
from service.web.access import ApiKeys
from service.web.asgi_exchange import AsgiCarrier
from service.web.entry import Entry
from service.web.framework import declared_query, framework_handler, operation_id, raise_service_errors
from service.web.memory_budget import MemoryBudget, default_budget_bytes

_DESCRIPTION = "Send an image, get its class and calibrated scores. Requests are batched while the device is busy."


class Application(FastAPI):
    """FastAPI behind ``entry``, which answers the ``DocumentedRoute``s without it."""

    def __init__(self, context: ServiceContext, keys: ApiKeys) -> None:
        settings = context.settings
        super().__init__(
            title="CIFAR-10 prediction service",
            description=_DESCRIPTION,
            version=__version__,
            redoc_url=None,
            docs_url=None,
            redirect_slashes=False,
            generate_unique_id_function=operation_id,
        )
        self.context = context
        self._keys_required = keys.required
        raise_service_errors(self)
        own = [*predict_routes(context), *hugging_face_routes(context), *infer_routes(context), *explain_routes(context)]
        own += admin_routes(context)
        routers = [health_router(context), open_inference_router(context), metrics_router(context)]
        page = page_router()
        # Listed here, since what FastAPI keeps of a router differs between its versions.
        routes = [*self.routes, *own, *(route for router in (*routers, page) for route in router.routes)]
        self.router.routes.extend(own)
        for router in routers:
            self.include_router(router, dependencies=[Depends(declared_query)])
        self.include_router(page)
        self._tracer = open_tracer(settings)
        paths = dict.fromkeys(path for route in routes if (path := getattr(route, "path", None)))
        self._access_log = AccessLog(settings) if settings.access_log else None
        self.entry = Entry(
            settings,
            Telemetry(context.metrics, [*paths], self._access_log, self._tracer),
            keys,
            context.is_draining,
            context.decoder.memory,
            {route.path: route.handler for route in own if not route.param_convertors},
            [(route.path_regex, route.path, route.handler) for route in own if route.param_convertors],
            framework_handler(super().__call__, settings.root_path.rstrip("/")),
        )
        self._carrier = AsgiCarrier(self.entry)

    def openapi(self) -> dict[str, Any]:
        """See FastAPI; the document is made once."""
        if self.openapi_schema is None:
            complete(super().openapi(), keys_required=self._keys_required)
        return super().openapi()

    def close(self) -> None:
        """Let the decoder's threads end, write the last log lines and send the last spans."""
        self.context.decoder.close()
        if self.context.kept is not None:
            self.context.kept.close()
        if self._access_log is not None:
            self._access_log.flush()
        if self._tracer is not None:
            self._tracer.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request under any ASGI server."""
        if scope["type"] == "http":
            await self._carrier(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(
    settings: Settings,
    engine: Engine,
    *,
    metrics: Metrics | None = None,
    keys: ApiKeys | None = None,
    is_draining: Callable[[], bool] = lambda: False,
    gave_up: Callable[[], bool] = lambda: False,
    change_model: Callable[[str], None] | None = None,
) -> Application:
    """Make the application over any engine; for the functions that a supervisor answers see ``ServiceContext``.

    Requests count in ``metrics``, without it in a table of their own. ``keys`` are those of ``settings``, read before.
    """
    shares = share_cores(available_cores(), workers=settings.workers, decode_threads=settings.decode_threads)
    memory = MemoryBudget(settings.memory_budget_bytes or default_budget_bytes(shares.workers))
    decoder = Decoder(
        max_image_pixels=settings.max_image_pixels,
        threads=shares.decode_threads,
        max_waiting=settings.max_queue_images,
        memory=memory,
    )
    metrics = metrics or Metrics(make_values(workers=1), FIRST_WORKER)
    keys = keys or ApiKeys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    kept = None
    if settings.keep_folder is not None:
        bounds = {"max_files": settings.keep_max_files, "max_bytes": settings.keep_max_bytes}
        kept = KeptImages(settings.keep_folder, below=settings.keep_below, **bounds)
    return Application(ServiceContext(settings, engine, decoder, is_draining, gave_up, metrics, change_model, kept), keys)
