"""What the OpenAPI document says of many routes alike: bodies, parameters, errors, names of operations, keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from typing import Any

import orjson
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from service import __version__
from service.answers import DEFAULT_TOP_K
from service.engine.interface import ModelInfo
from service.errors import ERRORS
from service.schemas import EXAMPLE_IMAGE, PredictParameters, Problem
from service.web.entry import is_protected
from service.web.exchange import PROBLEM_TYPE, problem
from service.web.route import Route

_TITLE = "Image prediction service"
_DESCRIPTION = "Send an image, get its class and calibrated scores. Requests are batched while the device is busy."

_BINARY = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": ["file"]}
_OF_EVERY_REQUEST = (408, 422, 431, 500)  # 422: a query parameter that is not declared
_OF_A_BODY = (400, 413, 415, 503, 504)
_OF_A_KEY = (401, 429)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_ID = {"X-Request-ID": {"description": "the request's id", "schema": {"type": "string"}}}

ONE_IMAGE = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {**_FORM, "properties": {"file": _BINARY}}},
        "application/octet-stream": {"schema": _BINARY},
    },
}
SEVERAL_IMAGES = {
    "required": True,
    "content": {"multipart/form-data": {"schema": {**_FORM, "properties": {"file": {"type": "array", "items": _BINARY}}}}},
}
RAW_IMAGE = {"content": {"application/octet-stream": {"schema": _BINARY}}}
PNG = {"description": "the image, `size` x `size` pixels of RGB", "content": {"image/png": {"schema": _BINARY}}}
# How a body of each kind is sent by curl, by httpx and by a browser.
_SENT = {
    "multipart/form-data": ("-F file=@photo.jpg", 'files={"file": image}', "body: form"),
    "several": ("-F file=@photo.jpg -F file=@another.png", 'files=[("file", image), ("file", image)]', "body: form"),
    "application/octet-stream": (
        "-H 'Content-Type: image/jpeg' --data-binary @photo.jpg",
        'content=image, headers={"Content-Type": "image/jpeg"}',
        "body: file",
    ),
    "application/json": ("--json 'JSON'", "json=JSON", 'headers: { "Content-Type": "application/json" }, body: \'JSON\''),
}
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


_OPTIONS: dict[str, dict[str, Any]] = {
    "top_k": {"type": "integer", "minimum": 1, "default": DEFAULT_TOP_K},
    "unknown": {"type": "string", "enum": ["flag", "reject"], "default": "flag"},
    "threshold": {"type": "number", "minimum": 0, "maximum": 1},
}
OF_A_PREDICTION = [
    *(parameter(name, PredictParameters.model_fields[name].description or "", **_OPTIONS[name]) for name in _OPTIONS),
    *OF_A_REQUEST,
]


def document(routes: Iterable[Route], *, keys_required: bool, root_path: str) -> dict[str, Any]:
    """Make the OpenAPI document of the service."""
    made = get_openapi(
        title=_TITLE,
        version=__version__,
        description=_DESCRIPTION,
        routes=[_declared(route) for route in routes],
        servers=[{"url": root_path}] if root_path else None,
    )
    schemas = made["components"]["schemas"]
    for path, operations in made["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                operation["description"] += _examples(path, operation, schemas)
            has_key = (keys_required and is_protected(path)) or path.startswith("/admin/")
            if has_key:
                made["components"]["securitySchemes"] = _KEYS
                operation["security"] = [{name: []} for name in _KEYS]
            operation["responses"].get("200", {}).setdefault("headers", {}).update(_ID)
            if "default" not in operation["responses"]:
                body = _OF_A_BODY if "requestBody" in operation else ()
                key = _OF_A_KEY if is_protected(path) or has_key else ()
                operation["responses"].pop("422", None)  # FastAPI's own, of another shape
                for status in (*_OF_EVERY_REQUEST, *body, *key):
                    operation["responses"].setdefault(str(status), problem_response(status))
    schemas["Problem"] = Problem.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return made


def _examples(path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """Return a request with each kind of body that an operation takes, in three languages, as Markdown."""
    content = operation["requestBody"]["content"]
    kinds = ["several"] if path == "/predict/batch" else [kind for kind in _SENT if kind in content]
    if path.startswith("/v2"):
        kinds = kinds[-1:]  # JSON: the other body is tensors, which no single line makes
    url = "http://localhost:8000" + re.sub(r"{(\w+)}", lambda name: name[1].upper(), path)
    schema = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    sample = json.dumps(schemas.get(schema, {}).get("examples", [{"inputs": EXAMPLE_IMAGE}])[0])
    curl, python, script = (
        [way.replace("JSON", sample) for way in ways] for ways in zip(*(_SENT[kind] for kind in kinds), strict=True)
    )
    read = ['image = open("photo.jpg", "rb").read()'] if kinds != ["application/json"] else []
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


def _declared(route: Route) -> APIRoute:
    """Declare ``route`` to FastAPI, which documents it and no more; variable segments of the path are text."""

    def endpoint() -> None: ...

    declaration = {**route.declaration}
    operation_id = declaration.pop("operation_id") + ("OfVersion" if "{model_version}" in route.path else "")
    annotations: dict[str, type] = dict.fromkeys(re.findall(r"{(\w+)}", route.path), str)
    if (body := declaration.pop("request_model", None)) is not None:
        annotations["body"] = body
    endpoint.__signature__ = Signature(  # type: ignore[attr-defined]  # what inspect, and so FastAPI, reads
        [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in annotations.items()]
    )
    extra = {"parameters": [*route.parameters], "requestBody": declaration.pop("body", None)}
    return APIRoute(
        route.path,
        endpoint,
        methods=[route.method],
        operation_id=operation_id,
        openapi_extra={key: value for key, value in extra.items() if value},
        **declaration,
    )


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
