"""``POST /predict`` and ``POST /predict/batch``: the hot path, from body to JSON.

Owns: the three ways an image comes in, the options, the answer's JSON and headers. Does not know: how a batch is made.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.types import Receive, Scope, Send

from service.body import ClientLeft, Part, header, parse_form, read_body
from service.context import ServiceContext
from service.engine import Prediction
from service.errors import (
    InvalidParameter,
    MalformedRequest,
    MissingFile,
    ServiceError,
    UnsupportedMediaType,
)
from service.problems import internal_error, problem_response
from service.request_id import request_id_of
from service.routes.asgi_route import AsgiRoute
from service.routes.responses import problem_responses
from service.schemas import Answer, BatchAnswer, PredictRequest

logger = logging.getLogger(__name__)

DEFAULT_TOP_K = 5
_PARTS_BESIDE_FILES = 16  # fields that a form may hold and that are not looked at


@dataclass(slots=True)
class Upload:
    """One image as it came in; ``top_k`` is set where the body itself says so."""

    data: bytes
    filename: str | None
    top_k: int | None = None


@dataclass(slots=True)
class _Classified:
    """One answered image and how long its decoding took."""

    answer: dict[str, Any]
    prediction: Prediction
    decode_s: float


class PredictEndpoint:
    """Both routes over one context, as ASGI callables."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def predict(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /predict``."""
        await self._respond(scope, receive, send, self._predict)

    async def predict_batch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /predict/batch``."""
        await self._respond(scope, receive, send, self._predict_batch)

    async def _respond(self, scope: Scope, receive: Receive, send: Send, handle: Any) -> None:
        """Run ``handle``, translate what it raises, and write the answer unless the client has left."""
        arrived = time.monotonic()
        try:
            body, headers = await self._until_client_leaves(scope, receive, handle, arrived)
        except ClientLeft:
            logger.debug("client left request_id=%s", request_id_of(scope))
            return
        except ServiceError as error:
            await problem_response(error, request_id_of(scope))(scope, receive, send)
            return
        except Exception:
            request_id = request_id_of(scope)
            logger.exception("request failed path=%s request_id=%s", scope["path"], request_id)
            await problem_response(internal_error(), request_id)(scope, receive, send)
            return
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id_of(scope).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _until_client_leaves(
        self, scope: Scope, receive: Receive, handle: Any, arrived: float
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Read the body, then work on it for as long as somebody waits for the answer."""
        body = await read_body(scope, receive, self._context.settings.max_body_bytes)
        work = asyncio.ensure_future(handle(scope, body, self._deadline(scope, arrived)))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientLeft
            return work.result()  # type: ignore[no-any-return]  # as handle gives it
        finally:
            leaving.cancel()
            work.cancel()

    async def _predict(self, scope: Scope, body: bytes, deadline: float) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        upload = one_upload(body, header(scope, b"content-type"))
        classes = len(self._context.model().class_names)
        top_k = check_top_k(upload.top_k if upload.top_k is not None else query_top_k(scope), classes)
        done = await self._classify(upload, top_k, deadline)
        prediction = done.prediction
        timing = b"decode;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f" % (
            done.decode_s * 1e3,
            prediction.queue_s * 1e3,
            prediction.compute_s * 1e3,
        )
        return orjson.dumps(done.answer), [(b"server-timing", timing), (b"x-batch-size", b"%d" % prediction.batch_size)]

    async def _predict_batch(self, scope: Scope, body: bytes, deadline: float) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        limit = self._context.settings.max_images_per_request
        uploads = form_files(body, header(scope, b"content-type"), limit)
        top_k = check_top_k(query_top_k(scope), len(self._context.model().class_names))
        outcomes = await asyncio.gather(*(self._entry(upload, top_k, deadline) for upload in uploads))
        return orjson.dumps({"results": outcomes}), []

    async def _entry(self, upload: Upload, top_k: int, deadline: float) -> dict[str, Any]:
        try:
            return (await self._classify(upload, top_k, deadline)).answer
        except ServiceError as error:
            told = {"status": error.status, "code": error.code, "detail": error.detail}
            return {"filename": upload.filename, "error": told}

    async def _classify(self, upload: Upload, top_k: int, deadline: float) -> _Classified:
        context = self._context
        began = time.monotonic()
        image = await context.decoder.decode(upload.data, context.model().input, deadline)
        decode_s = time.monotonic() - began
        prediction = await context.engine.predict(image[None], deadline)
        return _Classified(make_answer(prediction, 0, top_k, upload.filename), prediction, decode_s)

    def _deadline(self, scope: Scope, arrived: float) -> float:
        """Give the ``time.monotonic()`` by which the answer is due; it counts from the complete body's arrival."""
        limit_s = self._context.settings.request_timeout_s
        asked = header(scope, b"x-request-timeout-ms")
        if asked is None:
            return time.monotonic() + limit_s
        try:
            asked_s = float(asked) / 1e3
        except ValueError:
            raise MalformedRequest("X-Request-Timeout-Ms is not a number; send milliseconds") from None
        if not asked_s > 0:
            raise InvalidParameter("X-Request-Timeout-Ms must be above 0")
        return time.monotonic() + min(limit_s, asked_s)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def one_upload(body: bytes, content_type: bytes | None) -> Upload:
    """Take the one image from a body of any accepted Content-Type."""
    kind = (content_type or b"").partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data":
        files = _files(parse_form(body, content_type or b"", max_parts=1 + _PARTS_BESIDE_FILES))
        if len(files) > 1:
            raise MalformedRequest("the form has several 'file' parts; send one, or use /predict/batch")
        return files[0]
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        return Upload(body, None)
    if kind == b"application/json":
        return json_upload(body)
    raise UnsupportedMediaType(
        "send multipart/form-data with a part named 'file', the image itself as image/* or application/octet-stream,"
        " or application/json"
    )


def form_files(body: bytes, content_type: bytes | None, limit: int) -> list[Upload]:
    """Take every ``file`` part of a form; raise MissingFile when there is none."""
    kind = (content_type or b"").partition(b";")[0].strip().lower()
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("send multipart/form-data with parts named 'file'")
    files = _files(parse_form(body, content_type or b"", max_parts=limit + _PARTS_BESIDE_FILES))
    if len(files) > limit:
        raise InvalidParameter(f"the form has {len(files)} files and the limit is {limit}; send fewer in one request")
    return files


def _files(parts: Sequence[Part]) -> list[Upload]:
    files = [Upload(part.data, part.filename) for part in parts if part.name == "file"]
    if not files:
        raise MissingFile("the form has no part named 'file'; send the image under that name")
    return files


def json_upload(body: bytes) -> Upload:
    """Take the image from ``{"inputs": base64, "parameters": {"top_k"}}``; no URL is ever fetched."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MalformedRequest("the body is not valid JSON") from None
    inputs = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(inputs, str):
        raise MalformedRequest("send a JSON object with the image in base64 under 'inputs'")
    parameters = document.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise MalformedRequest("'parameters' must be a JSON object")
    top_k = (parameters or {}).get("top_k")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise MalformedRequest("'top_k' must be a whole number")
    return Upload(decode_base64(inputs), None, top_k)


def decode_base64(text: str) -> bytes:
    """Decode base64, or a ``data:`` URI of it; raise MalformedRequest for anything else, any other URL included."""
    if text[:5].lower() == "data:":
        options, comma, text = text.partition(",")
        if not comma or not options.lower().endswith(";base64"):
            raise MalformedRequest("the data: URI is not in base64; send data:image/jpeg;base64,...")
    elif "://" in text[:32]:
        raise MalformedRequest("URLs are not fetched; send the image itself in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRequest("'inputs' is not valid base64") from None


def query_top_k(scope: Scope) -> int:
    """Read ``top_k`` from the query; raise MalformedRequest when it is not a whole number."""
    query = scope["query_string"]
    if not query:
        return DEFAULT_TOP_K
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("top_k")
    if not values:
        return DEFAULT_TOP_K
    text = values[-1]
    if not text.removeprefix("-").isdecimal() or not text.isascii() or len(text) > 9:
        raise MalformedRequest("top_k must be a whole number")
    return int(text)


def check_top_k(top_k: int, classes: int) -> int:
    """Give ``top_k`` back if it is 1 to ``classes``, the default cut to what there is; raise InvalidParameter otherwise."""
    if top_k == DEFAULT_TOP_K:
        return min(top_k, classes)
    if not 1 <= top_k <= classes:
        raise InvalidParameter(f"top_k must be between 1 and {classes}, the number of classes")
    return top_k


def make_answer(prediction: Prediction, row: int, top_k: int, filename: str | None) -> dict[str, Any]:
    """Make the JSON of one image: classes by descending probability, equal ones in the order of the classes."""
    model = prediction.model
    scores = prediction.probabilities[row].tolist()
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    predictions = [{"label": model.class_names[index], "score": round(scores[index], 6)} for index in order]
    return {
        **predictions[0],
        "predictions": predictions,
        "filename": filename,
        "model": {"name": model.name, "version": model.version},
    }


def predict_routes(context: ServiceContext) -> list[AsgiRoute]:
    """Declare both routes."""
    endpoint = PredictEndpoint(context)
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
            endpoint.predict,
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
                        "application/json": {
                            "schema": PredictRequest.model_json_schema(ref_template="#/components/schemas/{model}")
                        },
                    },
                },
            },
        ),
        AsgiRoute(
            "/predict/batch",
            endpoint.predict_batch,
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
