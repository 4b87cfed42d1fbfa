"""The FastAPI application of one worker: routes, errors, request ids.

Owns: putting the parts together. Does not know: how a batch is made, processes.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.context import ServiceContext
from service.decoder import Decoder
from service.engine import Engine
from service.problems import install_problem_handlers
from service.request_id import request_id_of
from service.routes.explain import explain_routes
from service.routes.health import health_router
from service.routes.hf import hugging_face_routes
from service.routes.page import page_router
from service.routes.predict import predict_routes
from service.routes.v2 import infer_routes, open_inference_router
from service.settings import Settings

_DESCRIPTION = "Send an image, get its class and calibrated scores. Requests are batched while the device is busy."


class Application(FastAPI):
    """FastAPI, with the hot routes answered before its middleware; they are in its router all the same."""

    def __init__(self, context: ServiceContext) -> None:
        super().__init__(title="CIFAR-10 prediction service", description=_DESCRIPTION, version="0.1.0", redoc_url=None)
        self.context = context
        install_problem_handlers(self)
        hot_routes = [*predict_routes(context), *hugging_face_routes(context)]
        self.router.routes.extend([*hot_routes, *infer_routes(context), *explain_routes(context)])
        self.include_router(health_router(context))
        self.include_router(page_router())
        self.include_router(open_inference_router(context))
        self._hot: dict[str, ASGIApp] = {route.path: route.app for route in hot_routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if self.context.is_draining():
            send = _closing(send)
        hot = self._hot.get(scope["path"])
        if hot is not None and scope["method"] == "POST":
            await hot(scope, receive, send)
        else:
            await super().__call__(scope, receive, _with_request_id(scope, send))


def create_app(
    settings: Settings,
    engine: Engine,
    *,
    is_draining: Callable[[], bool] = lambda: False,
    gave_up: Callable[[], bool] = lambda: False,
) -> Application:
    """Make the application over any engine; ``is_draining`` and ``gave_up`` tell what a supervisor knows."""
    decoder = Decoder(max_image_pixels=settings.max_image_pixels, threads=settings.decode_threads)
    return Application(ServiceContext(settings, engine, decoder, is_draining, gave_up))


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
