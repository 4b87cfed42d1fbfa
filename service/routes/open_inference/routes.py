"""The paths of ``/v2``, and the order of an inference's steps."""

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
from service.routes.health import refuse_unless
from service.routes.open_inference import schemas
from service.routes.open_inference.inference import make_response, read_request
from service.routes.open_inference.statistics import model_statistics, numeric_version
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
    "default": {"model": schemas.ServerError, "description": "any error, with the status of its kind"}
}


async def _infer(context: ServiceContext, exchange: Exchange) -> Reply:
    """``POST /v2/models/NAME[/versions/VERSION]/infer``."""
    arrived, scope, deadline = time.monotonic(), exchange.scope, exchange.deadline
    model = require_model(context.model(), **scope.path_params)
    header_length = scope.header(b"inference-header-content-length")
    request, images = await read_body(exchange, read_request, header_length, model, context.settings.max_images_per_request)
    if request.parameters is not None and request.parameters.timeout:
        deadline = min(deadline, arrived + request.parameters.timeout / 1e6)
    done = await classify_images(context, exchange.record, images, deadline)
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
    """Return ``model`` if a path means it; raise NotFound otherwise."""
    if model_name != model.name:
        raise NotFound(f"there is no model of this name; the one here is '{model.name}'")
    if model_version not in (None, model.version, numeric_version(model)):
        raise NotFound(f"there is no such version of the model; the one here is '{model.version}'")
    return model


def infer_routes(context: ServiceContext) -> list[DocumentedRoute]:
    """Declare inference, with and without a version in the path."""
    binary = {"schema": {"type": "string", "format": "binary", "description": "the JSON, and the binary data after it"}}
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
            request_model=schemas.InferenceRequest,
            response_model=schemas.InferenceResponse,
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
    async def server_metadata(request: Request) -> schemas.ServerMetadata:
        return schemas.ServerMetadata(version=request.app.version)

    @router.get(
        "/health/live",
        summary="Whether the server works, or is starting or draining",
        responses={503: {"model": schemas.ServerLive}},
    )
    async def server_live(response: Response) -> schemas.ServerLive:
        return schemas.ServerLive(live=refuse_unless(context.is_live(), response))

    @router.get(
        "/health/ready", summary="Whether an inference would be answered", responses={503: {"model": schemas.ServerReady}}
    )
    async def server_ready(response: Response) -> schemas.ServerReady:
        return schemas.ServerReady(ready=refuse_unless(context.is_ready(), response))

    @router.post("/repository/index", summary="The models: one")
    async def repository_index() -> list[schemas.RepositoryEntry]:
        entry = schemas.RepositoryEntry(name=context.model().name, version=context.model().version, state="READY")
        if not context.is_ready():
            entry.state, entry.reason = "UNAVAILABLE", "the service is not ready"
        return [entry]

    @router.get("/models/stats", summary="What has been inferred by all models: one")
    async def all_statistics() -> schemas.StatisticsResponse:
        return model_statistics(context.model(), context.metrics.values)

    _declare_model_routes(router, context, _MODEL, any_version)
    _declare_model_routes(router, context, _VERSION, one_version)
    return router


def _declare_model_routes(router: APIRouter, context: ServiceContext, path: str, find: Callable[..., ModelInfo]) -> None:
    """Declare what there is to read of a model at ``path``; ``find`` returns the model that the path means."""
    found = Depends(find)

    @router.get(path, summary="The model's tensors")
    async def model_metadata(model: ModelInfo = found) -> schemas.ModelMetadata:
        return schemas.model_metadata(model, context.engine.status().runtime)

    @router.get(
        f"{path}/ready",
        summary="Whether an inference by this model would be answered",
        responses={503: {"model": schemas.ModelReady | schemas.ServerError}},
    )
    async def model_ready(response: Response, model: ModelInfo = found) -> schemas.ModelReady:
        return schemas.ModelReady(name=model.name, ready=refuse_unless(context.is_ready(), response))

    @router.get(f"{path}/config", summary="The model's configuration, as Triton gives it")
    async def model_config(model: ModelInfo = found) -> schemas.ModelConfig:
        return schemas.model_config(model, context.engine.status())

    @router.get(f"{path}/stats", summary="What has been inferred since the service started")
    async def statistics(model: ModelInfo = found) -> schemas.StatisticsResponse:
        return model_statistics(model, context.metrics.values)
