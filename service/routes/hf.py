"""``POST /hf``: image classification as Hugging Face's inference clients ask for it.

Owns: that dialect: the raw body or JSON, its parameters, the bare list of classes. Does not know: how a batch is made.
Source: Hugging Face, "Inference Providers", task image-classification.
"""

from __future__ import annotations

import orjson
from starlette.types import Receive, Scope, Send

from service.body import header
from service.context import ServiceContext
from service.errors import InvalidParameter, MalformedRequest, UnsupportedMediaType
from service.routes.asgi_route import AsgiRoute
from service.routes.classification import classify
from service.routes.exchange import Reply, respond
from service.routes.responses import problem_responses
from service.routes.uploads import DEFAULT_TOP_K, Upload, check_top_k, json_inputs, json_top_k
from service.schemas import HuggingFaceRequest, ScoredLabel

_PARAMETERS = ("top_k", "function_to_apply")


class HuggingFaceEndpoint:
    """The route over one context, as an ASGI callable."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def classify(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /hf``."""
        await respond(self._context, scope, receive, send, self._classify)

    async def _classify(self, scope: Scope, body: bytes, deadline: float) -> Reply:
        upload = hugging_face_upload(body, header(scope, b"content-type"))
        top_k = DEFAULT_TOP_K if upload.top_k is None else upload.top_k
        top_k = check_top_k(top_k, len(self._context.model().class_names))
        done = await classify(self._context, upload.data, deadline)
        return Reply(orjson.dumps(done.best_classes(top_k)), done.headers())


def hugging_face_upload(body: bytes, content_type: bytes | None) -> Upload:
    """Take the image from JSON, or from the body itself.

    The clients send bytes without a Content-Type, and curl calls every body a form; so the body is the image unless its type
    says JSON. Raises UnsupportedMediaType for a multipart form.
    """
    kind = (content_type or b"").partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data":
        raise UnsupportedMediaType("send the image itself as the body, or in base64 within JSON; forms go to /predict")
    if kind != b"application/json":
        return Upload(body, None)
    data, parameters = json_inputs(body)
    unknown = [name for name in parameters if name not in _PARAMETERS]
    if unknown:
        raise InvalidParameter(f"'parameters' takes {' and '.join(_PARAMETERS)} only; leave out what else it holds")
    function = parameters.get("function_to_apply")
    if function is not None and not isinstance(function, str):
        raise MalformedRequest("'function_to_apply' must be a string")
    if function not in (None, "softmax"):
        raise InvalidParameter("'function_to_apply' can only be softmax here: scores are calibrated probabilities")
    return Upload(data, None, json_top_k(parameters))


def hugging_face_routes(context: ServiceContext) -> list[AsgiRoute]:
    """Declare the route."""
    image = {"schema": {"type": "string", "format": "binary"}}
    return [
        AsgiRoute(
            "/hf",
            HuggingFaceEndpoint(context).classify,
            name="hugging_face",
            methods=["POST"],
            tags=["hugging face"],
            summary="Classify one image, for Hugging Face's clients",
            description="The image is the body itself, or base64 in JSON. The `detail` of an error is under `error` too.",
            request_model=HuggingFaceRequest,
            response_model=list[ScoredLabel],
            responses=problem_responses(400, 401, 413, 415, 422, 429, 500, 503, 504),
            openapi_extra={"requestBody": {"content": {"image/*": image, "application/octet-stream": image}}},
        )
    ]
