"""``POST /predict`` and ``POST /predict/batch``: from body to JSON.

Owns: the answer's JSON, one image's and many images'. Does not know: how an image comes in, how a batch is made.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from service.answers import DEFAULT_TOP_K, check_top_k, make_answer
from service.errors import ServiceError
from service.observability.request_record import note_refused
from service.routes.classification import Classification, classify_one_of
from service.routes.context import ServiceContext
from service.routes.one_image import OneImageEndpoint
from service.routes.responses import problem_responses
from service.routes.uploads import Upload, form_files, one_upload, query_top_k
from service.schemas import Answer, BatchAnswer, PredictRequest
from service.web.asgi_exchange import header
from service.web.asgi_route import AsgiRoute
from service.web.exchange import Reply, respond


class BatchEndpoint:
    """``POST /predict/batch`` over one context, as an ASGI callable."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await respond(self._context, scope, receive, send, self._handle)

    async def _handle(self, scope: Scope, body: bytes, deadline: float) -> Reply:
        limit = self._context.settings.max_images_per_request
        uploads = form_files(body, header(scope, b"content-type"), limit)
        top_k = check_top_k(query_top_k(scope), len(self._context.model().class_names))
        gate = self._context.decoder.gate()
        outcomes = await asyncio.gather(*(self._entry(scope, upload, top_k, deadline, gate) for upload in uploads))
        return Reply(orjson.dumps({"results": outcomes}))

    async def _entry(
        self, scope: Scope, upload: Upload, top_k: int, deadline: float, gate: asyncio.Semaphore
    ) -> dict[str, Any]:
        try:
            done = await classify_one_of(self._context, scope, upload.data, deadline, gate)
            return _answer(done, top_k, upload.filename)
        except ServiceError as error:
            note_refused(scope, error.code)
            told = {"status": error.status, "code": error.code, "detail": error.detail}
            return {"filename": upload.filename, "error": told}


def read_upload(scope: Scope, body: bytes) -> tuple[Upload, int]:
    """Take the one image of a request to ``/predict``, and how many classes it asks for."""
    upload = one_upload(body, header(scope, b"content-type"))
    return upload, query_top_k(scope) if upload.top_k is None else upload.top_k


def write_answer(done: Classification, top_k: int, filename: str | None) -> bytes:
    """Make the body of the answer."""
    return orjson.dumps(_answer(done, top_k, filename))


def _answer(done: Classification, top_k: int, filename: str | None) -> dict[str, Any]:
    model = done.prediction.model
    return make_answer(done.best_classes(top_k), model.name, model.version, filename)


def predict_routes(context: ServiceContext) -> list[AsgiRoute]:
    """Declare both routes."""
    binary = {"type": "string", "format": "binary"}
    file_form = {"type": "object", "required": ["file"], "properties": {"file": binary}}
    files_form = {"type": "object", "required": ["file"], "properties": {"file": {"type": "array", "items": binary}}}
    top_k = {
        "name": "top_k",
        "in": "query",
        "description": "how many classes to give, best first; at most the number of classes",
        "schema": {"type": "integer", "minimum": 1, "default": DEFAULT_TOP_K},
    }
    timeout = {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "deadline of this request in milliseconds over decode, queue and compute, at most the server's own",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    request_id = {
        "name": "X-Request-ID",
        "in": "header",
        "description": "an id of the client's own, echoed in the answer",
        "schema": {"type": "string", "maxLength": 128},
    }
    parameters = [top_k, timeout, request_id]
    headers = {
        "X-Request-ID": {"description": "the request's id", "schema": {"type": "string"}},
        "Server-Timing": {"description": "decode, queue and compute in milliseconds", "schema": {"type": "string"}},
        "X-Batch-Size": {"description": "images in the batch that this one ran in", "schema": {"type": "integer"}},
    }
    refusals = (400, 401, 413, 415, 422, 429, 500, 503, 504)
    return [
        AsgiRoute(
            "/predict",
            OneImageEndpoint(context, read_upload, write_answer),
            name="predict",
            methods=["POST"],
            tags=["predict"],
            summary="Classify one image",
            description="The image comes as a form's `file` part, as the body itself, or as base64 in JSON.",
            response_model=Answer,
            responses={200: {"headers": headers}, **problem_responses(*refusals)},
            openapi_extra={
                "parameters": parameters,
                "requestBody": {
                    "required": True,
                    "content": {
                        "multipart/form-data": {"schema": file_form},
                        "image/*": {"schema": binary},
                        "application/octet-stream": {"schema": binary},
                        "application/json": {"schema": PredictRequest.self_contained_schema()},
                    },
                },
            },
        ),
        AsgiRoute(
            "/predict/batch",
            BatchEndpoint(context),
            name="predict_batch",
            methods=["POST"],
            tags=["predict"],
            summary="Classify several images",
            description="One entry for each `file` part, in the order sent; one bad file never fails its neighbours.",
            response_model=BatchAnswer,
            responses={200: {"headers": {"X-Request-ID": headers["X-Request-ID"]}}, **problem_responses(*refusals)},
            openapi_extra={
                "parameters": parameters,
                "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": files_form}}},
            },
        ),
    ]
