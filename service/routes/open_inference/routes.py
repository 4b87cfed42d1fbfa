"""``/v2``: the Open Inference Protocol with Triton's extensions, on its paths.

Owns: paths, which model a path means, and the order of a request's steps. Does not know: the protocol's objects, which
``service.routes.open_inference`` reads and makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from service.engine.interface import ModelInfo
from service.errors import NotFound
from service.routes.classification import classify_images
from service.routes.context import ServiceContext
from service.routes.open_inference import metadata, statistics
from service.routes.open_inference.request import parse_request
from service.routes.open_inference.response import make_response
from service.routes.open_inference.schemas import InferenceRequest, InferenceResponse
from service.web.body import read_body
from service.web.content_encoding import compress
from service.web.exchange import Exchange, in_task
from service.web.framework import DocumentedRoute
from service.web.reply import Reply

PREFIX = "/v2"
_MODEL = "/models/{model_name}"
_VERSION = "/models/{model_name}/versions/{model_version}"
_TAGS: list[str | Enum] = ["open inference"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": metadata.ServerError, "description": "any refusal, with the status of its kind"}
}
_RETRY_AFTER_S = "1"


async def _infer(context: ServiceContext, exchange: Exchange) -> Reply:
    """``POST /v2/models/NAME[/versions/VERSION]/infer``."""
    arrived, scope, deadline = time.monotonic(), exchange.scope, exchange.deadline
    settings = context.settings
    model = require_model(context.model(), **scope.path_params)
    header_length = scope.header(b"inference-header-content-length")
    request = await read_body(exchange, parse_request, header_length, model, settings.max_images_per_request)
    if request.timeout_s is not None:
        deadline = min(deadline, arrived + request.timeout_s)
    done = await classify_images(context, exchange.record, request.images, deadline)
    require_model(done.prediction.model, **scope.path_params)  # it may have been replaced while the request waited
    response, json_length = make_response(request, done.prediction)
    response, encoding = compress(response, scope.header(b"accept-encoding"))
    headers = done.headers()
    if encoding is not None:
        headers.append((b"content-encoding", encoding))
    if json_length is None:
        return Reply(response, headers)
    headers.append((b"inference-header-content-length", b"%d" % json_length))
    return Reply(response, headers, b"application/octet-stream")


def require_model(model: ModelInfo, model_name: str, model_version: str | None = None) -> ModelInfo:
    """Give ``model`` back if a path means it; raise NotFound otherwise."""
    if model_name != model.name:
        raise NotFound(f"there is no model of this name; the one here is '{model.name}'")
    if model_version not in (None, model.version, statistics.numeric_version(model)):
        raise NotFound(f"there is no such version of the model; the one here is '{model.version}'")
    return model


def infer_routes(context: ServiceContext) -> list[DocumentedRoute]:
    """Declare inference, with and without a version in the path."""
    binary = {"schema": {"type": "string", "format": "binary", "description": "the JSON, and the binary data behind it"}}
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "bytes of the JSON when binary data follows it; 0 when the body is one encoded image and nothing else",
        "schema": {"type": "integer", "minimum": 0},
    }
    return [
        DocumentedRoute(
            f"{PREFIX}{path}/infer",
            in_task(partial(_infer, context)),
            name="infer",
            tags=_TAGS,
            summary="Classify images",
            description="One bad image fails the request. Bodies may be compressed with gzip or deflate, both ways.",
            request_model=InferenceRequest,
            response_model=InferenceResponse,
            responses={200: {"content": {"application/octet-stream": binary}}, **_ERRORS},
            openapi_extra={"parameters": [length], "requestBody": {"content": {"application/octet-stream": binary}}},
        )
        for path in (_MODEL, _VERSION)
    ]


def open_inference_router(context: ServiceContext) -> APIRouter:
    """Declare health, metadata and the like over ``context``; none of them waits for the engine."""
    router = APIRouter(prefix=PREFIX, tags=_TAGS, responses=_ERRORS)

    def any_version(model_name: str) -> ModelInfo:
        return require_model(context.model(), model_name)

    def one_version(model_name: str, model_version: str) -> ModelInfo:
        return require_model(context.model(), model_name, model_version)

    @router.get("", summary="Which server this is, and its extensions")
    async def server_metadata(request: Request) -> metadata.ServerMetadata:
        return metadata.server_metadata(request.app.version)

    @router.get(
        "/health/live",
        summary="Whether the server works, or is starting or draining",
        responses={503: {"model": metadata.ServerLive}},
    )
    async def server_live(response: Response) -> metadata.ServerLive:
        live = context.state()[0] in ("ready", "starting", "draining")
        _refuse_unless(live, response)
        return metadata.ServerLive(live=live)

    @router.get(
        "/health/ready", summary="Whether an inference would be answered", responses={503: {"model": metadata.ServerReady}}
    )
    async def server_ready(response: Response) -> metadata.ServerReady:
        ready = context.state()[0] == "ready"
        _refuse_unless(ready, response)
        return metadata.ServerReady(ready=ready)

    @router.post("/repository/index", summary="The models: one")
    async def repository_index() -> list[metadata.RepositoryEntry]:
        model = context.model()
        ready = context.state()[0] == "ready"
        return [metadata.repository_entry(model, ready)]

    @router.get("/models/stats", summary="What has been inferred by all models: one")
    async def all_statistics() -> statistics.StatisticsResponse:
        return statistics.model_statistics(context.model(), context.metrics.values)

    _declare_model_routes(router, context, _MODEL, any_version)
    _declare_model_routes(router, context, _VERSION, one_version)
    return router


def _declare_model_routes(router: APIRouter, context: ServiceContext, path: str, find: Callable[..., ModelInfo]) -> None:
    """Declare what there is to read of a model at ``path``; ``find`` gives the model that the path means."""
    found = Depends(find)

    @router.get(path, summary="The model's tensors")
    async def model_metadata(model: ModelInfo = found) -> metadata.ModelMetadata:
        return metadata.model_metadata(model, context.engine.status().runtime)

    @router.get(
        f"{path}/ready",
        summary="Whether an inference by this model would be answered",
        responses={503: {"model": metadata.ModelReady | metadata.ServerError}},
    )
    async def model_ready(response: Response, model: ModelInfo = found) -> metadata.ModelReady:
        ready = context.state()[0] == "ready"
        _refuse_unless(ready, response)
        return metadata.ModelReady(name=model.name, ready=ready)

    @router.get(f"{path}/config", summary="The model's configuration, as Triton gives it")
    async def model_config(model: ModelInfo = found) -> metadata.ModelConfig:
        return metadata.model_config(model, context.engine.status())

    @router.get(f"{path}/stats", summary="What has been inferred since the service started")
    async def model_statistics(model: ModelInfo = found) -> statistics.StatisticsResponse:
        return statistics.model_statistics(model, context.metrics.values)


def _refuse_unless(healthy: bool, response: Response) -> None:
    if not healthy:
        response.status_code = 503
        response.headers["Retry-After"] = _RETRY_AFTER_S
    response.headers["Cache-Control"] = "no-store"
