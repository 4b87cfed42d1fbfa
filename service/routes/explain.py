"""``POST /view`` and ``POST /explain``: what the network sees of an image, and where it found what speaks for a class.

Owns: the PNG, the heatmap's JSON, the ``label`` of the query. Does not know: how images come in, how a heatmap is made.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any
from urllib.parse import parse_qs

import orjson
from PIL import Image
from starlette.types import Receive, Scope, Send

from service.errors import InvalidParameter
from service.routes.context import ServiceContext
from service.routes.responses import problem_responses
from service.routes.uploads import one_upload
from service.schemas import Heatmap, PredictRequest
from service.web.asgi_exchange import header
from service.web.asgi_route import AsgiRoute
from service.web.exchange import Reply, respond


class ExplainEndpoint:
    """Both routes over one context, as ASGI callables."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def view(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /view``."""
        await respond(self._context, scope, receive, send, self._view)

    async def explain(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /explain``."""
        await respond(self._context, scope, receive, send, self._explain)

    async def _view(self, scope: Scope, body: bytes, deadline: float) -> Reply:
        upload = one_upload(body, header(scope, b"content-type"))
        image = await self._context.decoder.decode(upload.data, self._context.model().input, deadline)
        png = BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(png, "PNG")
        return Reply(png.getvalue(), content_type=b"image/png")

    async def _explain(self, scope: Scope, body: bytes, deadline: float) -> Reply:
        upload = one_upload(body, header(scope, b"content-type"))
        model = self._context.model()
        label = _query_label(scope, model.class_names)
        image = await self._context.decoder.decode(upload.data, model.input, deadline)
        explanation = await self._context.engine.explain(image, label, deadline)
        answer = {
            "label": explanation.model.class_names[explanation.label],
            "heatmap": [[round(value, 3) for value in row] for row in explanation.heatmap.tolist()],
            "filename": upload.filename,
            "model": {"name": explanation.model.name, "version": explanation.model.version},
        }
        return Reply(orjson.dumps(answer))


def _query_label(scope: Scope, class_names: tuple[str, ...]) -> int | None:
    """Give the number of the class that the query names, None where it names none; raise InvalidParameter."""
    values = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True).get("label")
    if not values:
        return None
    if values[-1] not in class_names:
        raise InvalidParameter("the model has no class of this label; GET /labels lists those it has")
    return class_names.index(values[-1])


def explain_routes(context: ServiceContext) -> list[AsgiRoute]:
    """Declare both routes."""
    endpoint = ExplainEndpoint(context)
    binary: dict[str, Any] = {"type": "string", "format": "binary"}
    body = {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {"file": binary}}},
            "image/*": {"schema": binary},
            "application/octet-stream": {"schema": binary},
            "application/json": {"schema": PredictRequest.self_contained_schema()},
        },
    }
    label = {
        "name": "label",
        "in": "query",
        "description": "the class to explain, one of GET /labels; the likeliest one by default",
        "schema": {"type": "string"},
    }
    png = {"description": "the image, `size` x `size` pixels of RGB", "content": {"image/png": {"schema": binary}}}
    return [
        AsgiRoute(
            "/view",
            endpoint.view,
            name="view",
            methods=["POST"],
            tags=["explain"],
            summary="Show an image as the network sees it",
            description="The PNG has the size of the network's input and holds the very pixels that a prediction starts from.",
            responses={200: png, **problem_responses(400, 401, 413, 415, 422, 429, 503, 504)},
            openapi_extra={"requestBody": body},
        ),
        AsgiRoute(
            "/explain",
            endpoint.explain,
            name="explain",
            methods=["POST"],
            tags=["explain"],
            summary="Show where the network found what speaks for a class",
            description="A class activation map, made on demand beside the device; predictions do not wait for it.",
            response_model=Heatmap,
            responses=problem_responses(400, 401, 404, 413, 415, 422, 429, 500, 503, 504),
            openapi_extra={"parameters": [label], "requestBody": body},
        ),
    ]
