"""The paths of ``/v2``, and the order of an inference's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
from pydantic import BaseModel

from service import __version__
from service.engine.interface import ModelInfo
from service.errors import NotFound
from service.routes.classification import headers
from service.routes.context import ServiceContext
from service.routes.open_inference import schemas
from service.routes.open_inference.inference import classify_images, make_response, read_request
from service.routes.open_inference.statistics import model_statistics, numeric_version
from service.routes.openapi import parameter
from service.routes.operations import probe_reply
from service.web.body import read_body
from service.web.content_encoding import compress
from service.web.exchange import Exchange, Handler, Reply
from service.web.route import Route, json_reply

PREFIX = "/v2"
_MODEL = "/models/{model_name}"
_VERSION = "/models/{model_name}/versions/{model_version}"
_TAGS = ["open inference"]
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
    reply_headers = headers(done)
    if encoding is not None:
        reply_headers.append((b"content-encoding", encoding))
    if json_length is None:
        return Reply(response, reply_headers)
    reply_headers.append((b"inference-header-content-length", b"%d" % json_length))
    return Reply(response, reply_headers, b"application/octet-stream")


def require_model(model: ModelInfo, model_name: str, model_version: str | None = None) -> ModelInfo:
    """Return ``model`` if a path means it; raise NotFound otherwise."""
    if model_name != model.name:
        raise NotFound(f"there is no model of this name; the one here is '{model.name}'")
    if model_version not in (None, model.version, numeric_version(model)):
        raise NotFound(f"there is no such version of the model; the one here is '{model.version}'")
    return model


def open_inference_routes(context: ServiceContext) -> list[Route]:
    """Declare inference, metadata and the like over ``context``; inference alone waits for the engine."""

    def route(path: str, handler: Handler, name: str, summary: str, made: Any, **declaration: Any) -> Route:
        responses = {**_ERRORS, **declaration.pop("responses", {})}
        return Route(PREFIX + path, handler, name, summary, tags=_TAGS, response_model=made, responses=responses, **declaration)

    def about(path: str, name: str, summary: str, made: type[BaseModel], make: Callable[..., BaseModel]) -> Route:
        def answer(exchange: Exchange) -> Reply:
            named = exchange.scope.path_params
            return json_reply(make(require_model(context.model(), **named)) if named else make())

        return route(path, answer, name, summary, made)

    def probe(path: str, name: str, summary: str, made: type[BaseModel], is_healthy: Callable[[], bool]) -> Route:
        def answer(exchange: Exchange) -> Reply:
            named, healthy = exchange.scope.path_params, is_healthy()
            names = {"name": require_model(context.model(), **named).name} if named else {}
            return probe_reply(made.model_validate({"live": healthy, "ready": healthy, **names}), healthy=healthy)

        return route(
            path,
            answer,
            name,
            summary,
            made,
            responses={503: {"model": made | schemas.ServerError if "{" in path else made}},
        )

    def repository_index(_: Exchange) -> Reply:
        model, is_ready = context.model(), context.is_ready()
        entry = schemas.RepositoryEntry(name=model.name, version=model.version, state="READY")
        if not is_ready:
            entry.state, entry.reason = "UNAVAILABLE", "the service is not ready"
        return Reply(orjson.dumps([entry.model_dump()]))

    def metadata(model: ModelInfo) -> schemas.ModelMetadata:
        return schemas.model_metadata(model, context.engine.status().runtime)

    def config(model: ModelInfo) -> schemas.ModelConfig:
        return schemas.model_config(model, context.engine.status())

    def statistics(model: ModelInfo | None = None) -> schemas.StatisticsResponse:
        return model_statistics(model or context.model(), context.metrics.values)

    s, index = schemas, repository_index
    server = partial(s.ServerMetadata, version=__version__)
    binary = {"schema": {"type": "string", "format": "binary", "description": "the JSON, and the binary data after it"}}
    length = parameter(
        "Inference-Header-Content-Length",
        "bytes of the JSON when binary data follows it; 0 when the body is one encoded image and nothing else",
        "header",
        type="integer",
        minimum=0,
    )
    routes = [
        about("", "server_metadata", "Which server this is, and its extensions", s.ServerMetadata, server),
        probe(
            "/health/live", "server_live", "Whether the server works, or is starting or draining", s.ServerLive, context.is_live
        ),
        probe("/health/ready", "server_ready", "Whether an inference would be answered", s.ServerReady, context.is_ready),
        route("/repository/index", index, "repository_index", "The models: one", list[s.RepositoryEntry], method="POST"),
        about("/models/stats", "all_statistics", "What has been inferred by all models: one", s.StatisticsResponse, statistics),
    ]
    for path in (_MODEL, _VERSION):
        ready, stats = (
            "Whether an inference by this model would be answered",
            "What has been inferred since the service started",
        )
        routes += [
            route(
                f"{path}/infer",
                partial(_infer, context),
                "infer",
                "Classify images",
                s.InferenceResponse,
                method="POST",
                description="One bad image fails the request. Bodies may be compressed with gzip or deflate, both ways.",
                request_model=s.InferenceRequest,
                responses={200: {"content": {"application/octet-stream": binary}}},
                parameters=[length],
                body={"content": {"application/octet-stream": binary}},
            ),
            about(path, "model_metadata", "The model's tensors", s.ModelMetadata, metadata),
            probe(f"{path}/ready", "model_ready", ready, s.ModelReady, context.is_ready),
            about(f"{path}/config", "model_config", "The model's configuration, as Triton gives it", s.ModelConfig, config),
            about(f"{path}/stats", "statistics", stats, s.StatisticsResponse, statistics),
        ]
    return routes
