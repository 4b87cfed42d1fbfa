"""The paths of ``/v2``, and the order of an inference's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, get_type_hints

from service.engine.interface import ModelInfo
from service.errors import NotFound
from service.routes.classification import headers
from service.routes.context import ServiceContext
from service.routes.open_inference import about
from service.routes.open_inference import schemas as s
from service.routes.open_inference.inference import classify_images, make_response, read_request
from service.routes.openapi import Body, parameter
from service.routes.operations import probe_reply
from service.web.body import read_body
from service.web.content_encoding import compress
from service.web.exchange import Exchange, Reply
from service.web.route import Route, json_reply

PREFIX = "/v2"
_MODEL = "/models/{model_name}"
_VERSION = "/models/{model_name}/versions/{model_version}"
_TAGS = ["open inference"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": s.ServerError, "description": "any error, with the status of its kind"}
}


async def _infer(context: ServiceContext, exchange: Exchange) -> Reply:
    """Classify images.

    One bad image fails the request. Bodies may be compressed with gzip or deflate, both ways.
    """
    arrived, scope = time.monotonic(), exchange.scope
    model = require_model(context.model(), **scope.params)
    header_length = scope.header(b"inference-header-content-length")
    request, images = await read_body(exchange, read_request, header_length, model, context.settings.max_images_per_request)
    if request.parameters is not None and request.parameters.timeout:
        exchange.deadline = min(exchange.deadline, arrived + request.parameters.timeout / 1e6)
    done = await classify_images(context, exchange, images)
    require_model(done.prediction.model, **scope.params)  # it may have been replaced while the request waited
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
    if model_version not in (None, model.version, about.numeric_version(model)):
        raise NotFound(f"there is no such version of the model; the one here is '{model.version}'")
    return model


def open_inference_routes(context: ServiceContext) -> list[Route]:
    """Declare inference, metadata and the like over ``context``; inference alone waits for the engine."""

    def route(path: str, make: Callable[..., Any], **declaration: Any) -> Route:
        """Declare what ``make`` says of the model that the path names, or of the server where it names none."""

        def answer(exchange: Exchange) -> Reply:
            named = exchange.scope.params
            content = make(context, require_model(context.model(), **named)) if named else make(context)
            return probe_reply(content, healthy=content.is_so) if isinstance(content, s.Probe) else json_reply(content)

        made = get_type_hints(make)["return"]
        responses = dict(_ERRORS)
        if made in s.Probe.__subclasses__():
            responses[503] = {"model": made | s.ServerError if "{" in path else made}
        return Route(PREFIX + path, wraps(make)(answer), tags=_TAGS, response_model=made, responses=responses, **declaration)

    binary = {"type": "string", "format": "binary", "description": "the JSON, and the binary data after it"}
    length = parameter(
        "Inference-Header-Content-Length",
        "bytes of the JSON when binary data follows it; 0 when the body is one encoded image and nothing else",
        "header",
        type="integer",
        minimum=0,
    )
    routes = [
        route("", about.server_metadata),
        route("/health/live", about.server_live),
        route("/health/ready", about.server_ready),
        route("/repository/index", about.repository_index, method="POST"),
        route("/models/stats", about.all_statistics),
    ]
    for path in (_MODEL, _VERSION):
        routes += [
            Route(
                f"{PREFIX}{path}/infer",
                partial(_infer, context),
                method="POST",
                tags=_TAGS,
                request_model=s.InferenceRequest,
                response_model=s.InferenceResponse,
                responses={**_ERRORS, 200: {"content": {"application/octet-stream": {"schema": binary}}}},
                parameters=[length],
                bodies=[Body("application/octet-stream", binary)],
            ),
            route(path, about.model_metadata),
            route(f"{path}/ready", about.model_ready),
            route(f"{path}/config", about.model_config),
            route(f"{path}/stats", about.statistics),
        ]
    return routes
