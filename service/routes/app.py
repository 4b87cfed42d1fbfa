"""The FastAPI application of one worker: routes, errors, request ids.

Owns: putting the parts together. Does not know: how a batch is made, processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.cpu import available_cores, share_cores
from service.engine.interface import Engine
from service.errors import Overloaded, Unauthorized
from service.observability.access_log import AccessLog
from service.observability.metrics import FIRST_WORKER, Metrics, make_values
from service.observability.request_id import request_id_of
from service.observability.telemetry import Telemetry
from service.observability.tracing import open_tracer
from service.routes.admin import admin_router
from service.routes.context import ServiceContext
from service.routes.decoder import Decoder
from service.routes.explain import explain_routes
from service.routes.health import health_router
from service.routes.hugging_face import hugging_face_routes
from service.routes.metrics import metrics_router
from service.routes.one_image import OneImageEndpoint
from service.routes.open_inference.routes import infer_routes, open_inference_router
from service.routes.page import page_router
from service.routes.predict import predict_routes
from service.settings import Settings
from service.web.access import ApiKeys, check_key
from service.web.entry import DirectEntry
from service.web.memory_budget import MemoryBudget, default_budget_bytes
from service.web.problems import error_response, install_problem_handlers
from service.web.rate_limit import open_rate_limiter

_DESCRIPTION = "Send an image, get its class and calibrated scores. Requests are batched while the device is busy."

_OPEN_PATHS = frozenset({"/", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/health"})
_OPEN_PREFIXES = ("/health/", "/v2/health/", "/page/", "/admin/")  # the last has a key of its own


class Application(FastAPI):
    """FastAPI, with the hot routes answered before its middleware; they are in its router all the same."""

    def __init__(self, context: ServiceContext) -> None:
        super().__init__(title="CIFAR-10 prediction service", description=_DESCRIPTION, version="0.1.0", redoc_url=None)
        self.context = context
        self._paths: list[str] = []
        install_problem_handlers(self)
        hot_routes = [*predict_routes(context), *hugging_face_routes(context), *infer_routes(context)]
        self.router.routes.extend([*hot_routes, *explain_routes(context)])
        self.include_router(health_router(context))
        self.include_router(page_router())
        self.include_router(open_inference_router(context))
        self.include_router(metrics_router(context))
        self.include_router(admin_router(context))
        origins = [origin.strip() for origin in context.settings.cors_origins.split(",") if origin.strip()]
        self._entry: ASGIApp = self._answer
        if origins:  # around everything, hot routes and refusals included
            self._entry = CORSMiddleware(self._answer, origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
        self._hot: dict[str, ASGIApp] = {route.path: route.app for route in hot_routes if not route.param_convertors}
        self._hot_templates = [route for route in hot_routes if route.param_convertors]
        self._rate_limiter = open_rate_limiter(context.settings)
        self._tracer = open_tracer(context.settings)
        access_log = AccessLog() if context.settings.access_log else None
        paths = dict.fromkeys(path for route in self.routes if (path := getattr(route, "path", None)))
        telemetry = Telemetry(self._entry, context.metrics, [*paths, *self._paths], access_log, self._tracer)
        self._entry = telemetry
        # What these four do belongs to the ASGI way alone: some await, some want the client's address as proxies give it.
        only_asgi = origins or self._rate_limiter or self._tracer or access_log
        one_image = {path: route for path, route in self._hot.items() if isinstance(route, OneImageEndpoint)}
        self.direct = None if only_asgi else DirectEntry(context, telemetry, one_image)

    def include_router(self, router: APIRouter, **options: Any) -> None:
        """See FastAPI; the paths are noted, since what FastAPI keeps of a router differs between its versions."""
        self._paths += [path for route in router.routes if (path := getattr(route, "path", None))]
        super().include_router(router, **options)

    def close(self) -> None:
        """Let the decoder's threads end, and send the last spans."""
        self.context.decoder.close()
        if self._tracer is not None:
            self._tracer.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if self.context.is_draining():
            send = _closing(send)
        await self._entry(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_protected(scope["path"]):
            try:
                check_key(self.context.api_keys, scope)
                if self._rate_limiter is not None:
                    await self._rate_limiter.check(scope)
            except (Unauthorized, Overloaded) as error:
                await error_response(error, scope)(scope, receive, send)
                return
        hot = self._hot_app(scope) if scope["method"] == "POST" else None
        if hot is not None:
            await hot(scope, receive, send)
        else:
            await super().__call__(scope, receive, _with_request_id(scope, send))

    def _hot_app(self, scope: Scope) -> ASGIApp | None:
        """Find what answers a POST without the router, which takes 50 us of a request's 120."""
        app = self._hot.get(scope["path"])
        if app is None:
            for route in self._hot_templates:
                if match := route.path_regex.match(scope["path"]):
                    scope.update(route=route, path_params=match.groupdict())
                    return route.app
        return app


def create_app(
    settings: Settings,
    engine: Engine,
    *,
    metrics: Metrics | None = None,
    is_draining: Callable[[], bool] = lambda: False,
    gave_up: Callable[[], bool] = lambda: False,
    change_model: Callable[[str], None] | None = None,
) -> Application:
    """Make the application over any engine; for the functions that a supervisor answers see ``ServiceContext``.

    Requests count in ``metrics``, without it in a table of their own.
    """
    shares = share_cores(available_cores(), workers=settings.workers, decode_threads=settings.decode_threads)
    memory = MemoryBudget(settings.memory_budget_bytes or default_budget_bytes(shares.workers))
    decoder = Decoder(
        max_image_pixels=settings.max_image_pixels,
        threads=shares.decode_threads,
        max_waiting=settings.max_queue_images,
        memory=memory,
    )
    api_keys = ApiKeys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    metrics = metrics or Metrics(make_values(workers=1), FIRST_WORKER)
    return Application(ServiceContext(settings, engine, decoder, api_keys, is_draining, gave_up, metrics, change_model))


def _is_protected(path: str) -> bool:
    """Whether keys and the rate limit apply to ``path``: to all but health and what a browser loads first."""
    return path not in _OPEN_PATHS and not path.startswith(_OPEN_PREFIXES)


def _closing(send: Send) -> Send:
    """Ask clients to take their next request elsewhere: a drain must find no kept-alive connection in use."""

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return send_closing


def _with_request_id(scope: Scope, send: Send) -> Send:
    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message["headers"]
            if not any(key == b"x-request-id" for key, _ in headers):
                message = {**message, "headers": [*headers, (b"x-request-id", request_id_of(scope).encode())]}
        await send(message)

    return send_with_id
