"""An image and its options as they come in: in a form, as the body itself, in base64 within JSON; options in the query."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from service.answers import DEFAULT_OPTIONS, DEFAULT_TOP_K, OPTION_NAMES, Options, make_options
from service.errors import InvalidImage, InvalidParameter, MalformedRequest, MissingFile, UnsupportedMediaType
from service.model.formats import format_of
from service.web.body import load_json
from service.web.multipart import Part, parse_form

_PARTS_BESIDE_FILES = 16  # other fields that a form may hold
_UNTOLD_TYPES = (b"", b"application/x-www-form-urlencoded")  # what clients send that were not told a Content-Type
_MAX_JSON_COST = 10_000  # an image in base64 and its parameters cost less than 100
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")

OPTION_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "top_k",
        "in": "query",
        "description": "how many classes to give, best first; at most the number of classes",
        "schema": {"type": "integer", "minimum": 1, "default": DEFAULT_TOP_K},
    },
    {
        "name": "unknown",
        "in": "query",
        "description": "reject: the label and score of an image that is not known are null",
        "schema": {"type": "string", "enum": ["flag", "reject"], "default": "flag"},
    },
    {
        "name": "threshold",
        "in": "query",
        "description": "an image of a smaller typicality is not known; the model's own unless given",
        "schema": {"type": "number", "minimum": 0, "maximum": 1},
    },
]
"""What ``query_options`` reads, as OpenAPI describes it."""


@dataclass(slots=True)
class Upload:
    """One image as it came in; ``options`` are those in the body itself, and come before those of the query."""

    data: bytes
    filename: str | None
    options: Options = DEFAULT_OPTIONS


def one_upload(body: bytes, content_type: bytes | None) -> Upload:
    """Take the one image from a body of any accepted Content-Type."""
    kind = (content_type or b"").partition(b";")[0].strip().lower()
    if kind == b"multipart/form-data":
        parts = parse_form(body, content_type or b"", max_parts=1 + _PARTS_BESIDE_FILES)
        files = _files(parts)
        if len(files) > 1:
            raise MalformedRequest("the form has several 'file' parts; send one, or use /predict/batch")
        if len(parts) > 1:
            fields = (part for part in parts if part.name in OPTION_NAMES)
            files[0].options = _text_options({part.name: part.data.decode("utf-8", "replace").strip() for part in fields})
        return files[0]
    if kind.startswith(b"image/") or kind == b"application/octet-stream" or (kind in _UNTOLD_TYPES and _is_image(body)):
        return Upload(body, None)
    if kind == b"application/json":
        return json_upload(body)
    raise UnsupportedMediaType(
        "send multipart/form-data with a part named 'file', the image itself as image/* or application/octet-stream,"
        " or application/json"
    )


def _is_image(body: bytes) -> bool:
    """Whether ``body`` begins as an image; raises UnsupportedMediaType for one of a format that is not accepted."""
    try:
        return bool(format_of(body))
    except InvalidImage:
        return False


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
    """Take the image from ``{"inputs": base64, "parameters": {...}}``; no URL is ever fetched."""
    data, parameters = json_inputs(body)
    return Upload(data, None, json_options(parameters))


def json_inputs(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Take the image and the parameters from ``{"inputs": base64, "parameters": {...}}``."""
    document = load_json(body, max_cost=_MAX_JSON_COST)
    inputs = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(inputs, str):
        raise MalformedRequest("send a JSON object with the image in base64 under 'inputs'")
    parameters = document.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise MalformedRequest("'parameters' must be a JSON object")
    return decode_base64(inputs, "'inputs'"), parameters or {}


def json_options(parameters: dict[str, Any], others: Sequence[str] = ()) -> Options:
    """Read the options from ``parameters``, which may hold ``others`` as well.

    Raises InvalidParameter for a name that is none of them and for a value out of range, MalformedRequest for a ``top_k``
    that is not a whole number.
    """
    if not parameters.keys() <= {*OPTION_NAMES, *others}:
        raise InvalidParameter(f"'parameters' takes only {', '.join((*OPTION_NAMES, *others))}; leave out the others")
    top_k = parameters.get("top_k")
    if top_k is not None and type(top_k) is not int:  # bool is an int to isinstance, and not to JSON
        raise MalformedRequest("'top_k' must be a whole number")
    return make_options(top_k, parameters.get("unknown"), parameters.get("threshold"))


def query_values(query: bytes) -> dict[str, str]:
    """Return the last value of each parameter."""
    return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))


def query_options(query: bytes) -> Options:
    """Read ``top_k``, ``unknown`` and ``threshold``; raise InvalidParameter or MalformedRequest for bad values."""
    return _text_options(query_values(query)) if query else DEFAULT_OPTIONS


def _text_options(values: Mapping[str, str]) -> Options:
    top_k = values.get("top_k")
    if top_k is not None and (not top_k.removeprefix("-").isdecimal() or not top_k.isascii() or len(top_k) > 9):
        raise MalformedRequest("top_k must be a whole number")
    return make_options(None if top_k is None else int(top_k), values.get("unknown"), values.get("threshold"))


def decode_base64(text: str, name: str) -> bytes:
    """Decode base64, or a ``data:`` URI of it; raise MalformedRequest about ``name`` for all else, any other URL included.

    Line breaks, the URL-safe alphabet and missing padding are accepted, as encoders make them (RFC 4648, sections 3 and 5).
    """
    if text[:5].lower() == "data:":
        options, comma, text = text.partition(",")
        if not comma or not options.lower().endswith(";base64"):
            raise MalformedRequest(f"the data: URI in {name} is not in base64; send data:image/jpeg;base64,...")
    elif "://" in text[:32]:
        raise MalformedRequest("URLs are not fetched; send the image itself in base64")
    try:
        data = text.encode("ascii").translate(_STANDARD_ALPHABET, b" \t\r\n").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRequest(f"{name} is not valid base64") from None
