"""What the OpenAPI document says of many routes alike: bodies, parameters, errors, names of operations, keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import orjson
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from service import __version__
from service.engine.interface import ModelInfo
from service.errors import ERRORS
from service.schemas import EXAMPLE_IMAGE, PredictParameters, Problem
from service.web.entry import is_protected
from service.web.exchange import PROBLEM_TYPE, problem
from service.web.route import Route

_TITLE = "Image prediction service"
_DESCRIPTION = "Send an image, get its class and calibrated scores. Requests are batched while the device is busy."

_OF_EVERY_REQUEST = (408, 422, 431, 500)  # 422: a query parameter that is not declared
_OF_A_BODY = (400, 413, 415, 503, 504)
_OF_A_KEY = (401, 429)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_ID = {"X-Request-ID": {"description": "the request's id", "schema": {"type": "string"}}}


@dataclass(frozen=True)
class Body:
    """A kind of request body, and how curl, httpx and a browser send one; ``sent`` is empty where no line can do it."""

    media_type: str
    schema: Mapping[str, Any]
    sent: tuple[str, ...] = ()


_BINARY = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": ["file"]}
FORM = Body(
    "multipart/form-data",
    {**_FORM, "properties": {"file": _BINARY}},
    ("-F file=@photo.jpg", 'files={"file": image}', "body: form"),
)
FORM_OF_SEVERAL = Body(
    "multipart/form-data",
    {**_FORM, "properties": {"file": {"type": "array", "items": _BINARY}}},
    ("-F file=@photo.jpg -F file=@another.png", 'files=[("file", image), ("file", image)]', "body: form"),
)
RAW = Body(
    "application/octet-stream",
    _BINARY,
    (
        "-H 'Content-Type: image/jpeg' --data-binary @photo.jpg",
        'content=image, headers={"Content-Type": "image/jpeg"}',
        "body: file",
    ),
)
PNG = {"description": "the image, `size` x `size` pixels of RGB", "content": {"image/png": {"schema": _BINARY}}}
TIMING_HEADERS = {
    200: {
        "headers": {
            "Server-Timing": {"description": "decode, queue and compute in milliseconds", "schema": {"type": "string"}},
            "X-Batch-Size": {"description": "images in the batch that this one ran in", "schema": {"type": "integer"}},
        }
    }
}


def parameter(name: str, description: str, place: str = "query", **schema: Any) -> dict[str, Any]:
    """Return the declaration of a parameter."""
    return {"name": name, "in": place, "description": description, "schema": schema}


OF_A_REQUEST = [
    parameter(
        "X-Request-Timeout-Ms",
        "deadline of this request in milliseconds over decode, queue and compute, at most the server's own",
        "header",
        type="number",
        exclusiveMinimum=0,
    ),
    parameter("X-Request-ID", "an id of the client's own, echoed in the answer", "header", type="string", maxLength=128),
]


_OPTIONS = PredictParameters.model_json_schema()["properties"]  # of each the schema, or null
OF_A_PREDICTION = [
    *(parameter(name, option["description"], **option["anyOf"][0]) for name, option in _OPTIONS.items()),
    *OF_A_REQUEST,
]


def document(routes: Sequence[Route], *, keys_required: bool, root_path: str) -> dict[str, Any]:
    """Make the OpenAPI document of the service."""
    declared = [_declared(route, keys_required) for route in routes]
    made = get_openapi(
        title=_TITLE,
        version=__version__,
        description=_DESCRIPTION,
        routes=declared,
        servers=[{"url": root_path}] if root_path else None,
    )
    made["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    if any("security" in (route.openapi_extra or {}) for route in declared):
        made["components"]["securitySchemes"] = _KEYS
    return made


def _declared(route: Route, keys_required: bool) -> APIRoute:
    """Declare ``route`` to FastAPI, which documents it and no more; variable segments of the path are text."""

    def endpoint() -> None: ...

    declaration = {"bodies": (), "responses": {}, **route.declaration}
    bodies, request_model = declaration.pop("bodies"), declaration.pop("request_model", None)
    annotations: dict[str, type] = dict.fromkeys(re.findall(r"{(\w+)}", route.path), str)
    samples = [body.sent for body in bodies if body.sent]
    if request_model is not None:
        annotations["body"] = request_model
        samples.append(_sent_as_json(request_model))
    if samples:
        declaration["description"] += _examples(route.path, samples)
    endpoint.__signature__ = Signature(  # type: ignore[attr-defined]  # what inspect, and so FastAPI, reads
        [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in annotations.items()]
    )
    extra: dict[str, Any] = {"parameters": route.parameters} if route.parameters else {}
    if bodies:
        content = {body.media_type: {"schema": body.schema} for body in bodies}
        extra["requestBody"] = {"required": True, "content": content}
    is_admin, is_open = route.path.startswith("/admin/"), not is_protected(route.path)
    if is_admin or (keys_required and not is_open):
        extra["security"] = [{name: []} for name in _KEYS]
    responses = {**declaration.pop("responses")}
    if "default" not in responses:
        of_a_key = () if is_open and not is_admin else _OF_A_KEY
        statuses = (*_OF_EVERY_REQUEST, *(_OF_A_BODY if samples else ()), *of_a_key)
        responses = {status: problem_response(status) for status in statuses} | responses
    if "status_code" not in declaration:
        answer = responses.get(200, {})
        responses[200] = {**answer, "headers": {**answer.get("headers", {}), **_ID}}
    return APIRoute(
        route.path,
        endpoint,
        methods=[route.method],
        operation_id=declaration.pop("operation_id") + ("OfVersion" if "{model_version}" in route.path else ""),
        openapi_extra=extra,
        responses=responses,
        **declaration,
    )


def _sent_as_json(model: type[BaseModel]) -> tuple[str, ...]:
    sample = json.dumps(model.model_json_schema().get("examples", [{"inputs": EXAMPLE_IMAGE}])[0])
    return f"--json '{sample}'", f"json={sample}", f'headers: {{ "Content-Type": "application/json" }}, body: \'{sample}\''


def _examples(path: str, samples: Sequence[tuple[str, ...]]) -> str:
    """Return a request with each kind of body that an operation takes, in three languages, as Markdown."""
    url = "http://localhost:8000" + re.sub(r"{(\w+)}", lambda name: name[1].upper(), path)
    curl, python, script = zip(*samples, strict=True)
    read = [] if python[0].startswith("json=") else ['image = open("photo.jpg", "rb").read()']
    form = ["const form = new FormData();", 'form.append("file", file);'] if "body: form" in script else []
    lines = [
        *(f"curl {way} '{url}'" for way in curl),
        "",
        "# Python",
        "import httpx",
        *read,
        *(f'answer = httpx.post("{url}", {way})' for way in python),
        "",
        "// JavaScript; file is a File or a Blob",
        *form,
        *(f'await fetch("{url}", {{ method: "POST", {way} }});' for way in script),
    ]
    return "\n\n" + "\n".join(f"    {line}" for line in lines)


def about(text: bytes, model: ModelInfo) -> bytes:
    """Return the document ``text``, in JSON, with title and examples that are of ``model``."""
    size, texts = model.input.size, (model.name, model.version, *model.class_names[:2])
    name, version, first, second = (orjson.dumps(text)[1:-1] for text in texts)
    shown = {
        _TITLE.encode(): b"%s: %s" % (_TITLE.encode(), name),
        b"resnet18-cifar10": name,
        b"3f9a1c0b7e52": version,
        b'cat"': first + b'"',
        b'dog"': second + b'"',
        b"[-1,3,32,32]": b"[-1,3,%d,%d]" % (size, size),
    }
    return re.sub(b"|".join(map(re.escape, shown)), lambda match: shown[match[0]], text)


def problem_response(status: int) -> dict[str, Any]:
    """Describe the errors of this status, each code with an example."""
    errors = [error for error in ERRORS if error.status == status]
    examples = {
        error.code: {
            "value": problem(error((error.__doc__ or "").strip().replace("``", "'")), "5f0c1d2e3b4a59687786a5b4c3d2e1f0")
        }
        for error in errors
    }
    return {
        "description": "; ".join(f"`{error.code}`" for error in errors),
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples}},
    }
