"""An image and its options as they come in: in a form, as the body itself, in base64 within JSON; options in the query."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from service.answers import DEFAULT_OPTIONS, OPTION_NAMES, Options, make_options, number, require_once
from service.errors import InvalidImage, InvalidParameter, MalformedRequest, MissingFile, UnsupportedMediaType
from service.model.formats import format_of
from service.web.body import load_json

_PARTS_BESIDE_FILES = 16  # other fields that a form may hold
_UNTOLD_TYPES = (b"", b"application/x-www-form-urlencoded")  # what clients send that were not told a Content-Type
_MAX_JSON_COST = 10_000  # an image in base64 and its parameters cost less than 100
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_MAX_BOUNDARY_BYTES = 70  # RFC 2046, section 5.1.1
_MAX_HEAD_BYTES = 8192  # of the headers of one part

# What nearly every client sends, in 1 µs where the other expressions take 6.
_PLAIN_TYPE = re.compile(rb"multipart/form-data; ?boundary=([^\s;\"]+)")
_PLAIN_HEAD = re.compile(
    rb'\r\nContent-Disposition: form-data; name="([^"\\\r\n]*)"(?:; filename="([^"\\\r\n]*)")?'
    rb"(?:\r\nContent-Type: [^\r\n]*)?\r\n\r\n"
)
# One step for each byte, whatever the text: an unterminated quote goes to the end.
_PARAMETER = re.compile(rb';\s*([^\s=;"]+)[ \t]*=[ \t]*(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)(?:"|$)|([^\s;"]*))', re.DOTALL)
_DISPOSITION = re.compile(rb"\r\ncontent-disposition[ \t]*:([^\r\n]*+(?:\r\n[ \t][^\r\n]*+)*+)", re.IGNORECASE)
_LINE_END = re.compile(rb"[ \t]*\r\n")
_ESCAPED = re.compile(rb'\\(["\\])')


@dataclass(slots=True)
class Upload:
    """One image as it came in, or another part of a form; ``filename`` is what the client called it, if anything.

    ``options`` are those in the body itself, and come before those of the query.
    """

    data: bytes
    filename: str | None = None
    name: str = "file"
    options: Options = DEFAULT_OPTIONS


def media_type(content_type: bytes | None) -> bytes:
    """Return the type in a ``Content-Type``, in lower case and without parameters; empty if there is none."""
    return (content_type or b"").partition(b";")[0].strip().lower()


def one_upload(body: bytes, content_type: bytes | None) -> Upload:
    """Take the one image from a body of any accepted Content-Type."""
    kind = media_type(content_type)
    if kind == b"multipart/form-data":
        parts = parse_form(body, content_type or b"", max_parts=1 + _PARTS_BESIDE_FILES)
        files = _files(parts)
        if len(files) > 1:
            raise MalformedRequest("the form has several 'file' parts; send one, or use /predict/batch")
        return files[0]
    if kind.startswith(b"image/") or kind == b"application/octet-stream" or (kind in _UNTOLD_TYPES and _is_image(body)):
        return Upload(body)
    if kind == b"application/json":
        return json_upload(body)[0]
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
    if media_type(content_type) != b"multipart/form-data":
        raise UnsupportedMediaType("send multipart/form-data with parts named 'file'")
    files = _files(parse_form(body, content_type or b"", max_parts=limit + _PARTS_BESIDE_FILES))
    if len(files) > limit:
        raise InvalidParameter(f"the form has {len(files)} files and the limit is {limit}; send fewer in one request")
    return files


def _files(parts: Sequence[Upload]) -> list[Upload]:
    """Return the files, the first with the options that the form has."""
    files = [part for part in parts if part.name == "file"]
    if not files:
        raise MissingFile("the form has no part named 'file'; send the image under that name")
    if len(parts) > len(files):
        fields = [(part.name, part.data.decode("utf-8", "replace").strip()) for part in parts if part.name in OPTION_NAMES]
        require_once(name for name, count in Counter(name for name, _ in fields).items() if count > 1)
        files[0].options = text_options(dict(fields))
    return files


def json_upload(body: bytes, others: Sequence[str] = ()) -> tuple[Upload, dict[str, Any]]:
    """Take the image from ``{"inputs": base64, "parameters": {...}}``, and all its parameters; no URL is ever fetched.

    Raises InvalidParameter for a parameter that is neither an option nor one of ``others`` and for a value out of range,
    MalformedRequest for other JSON and a ``top_k`` that is not a whole number.
    """
    document = load_json(body, max_cost=_MAX_JSON_COST)
    inputs = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(inputs, str):
        raise MalformedRequest("send a JSON object with the image in base64 under 'inputs'")
    parameters = document.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise MalformedRequest("'parameters' must be a JSON object")
    data = decode_base64(inputs, "'inputs'")
    if not parameters.keys() <= {*OPTION_NAMES, *others}:
        raise InvalidParameter(f"'parameters' takes only {', '.join((*OPTION_NAMES, *others))}; leave out the others")
    return Upload(data, options=_options(parameters)), parameters


def text_options(values: Mapping[str, str]) -> Options:
    """Read ``top_k``, ``unknown`` and ``threshold``; raise InvalidParameter or MalformedRequest for bad values."""
    numbers = {
        name: "" if (read := number(values[name])) is None else read for name in ("top_k", "threshold") if name in values
    }
    return _options({**values, **numbers})


def _options(values: Mapping[str, Any]) -> Options:
    top_k = values.get("top_k")
    if top_k is not None and type(top_k) is not int:  # bool is an int to isinstance, and not to JSON
        raise MalformedRequest("top_k must be a whole number")
    return make_options(top_k, values.get("unknown"), values.get("threshold"))


def decode_base64(text: str, name: str) -> bytes:
    """Decode base64, or a ``data:`` URI of it; raise MalformedRequest about ``name`` for all else, any other URL included.

    Line breaks, the URL-safe alphabet and missing padding are accepted, as encoders make them (RFC 4648, sections 3 and 5).
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        options, comma, text = text.partition(",")
        if not comma or not options.lower().replace(" ", "").endswith(";base64"):
            raise MalformedRequest(f"the data: URI in {name} is not in base64; send data:image/jpeg;base64,...")
    elif "://" in text[:32]:
        raise MalformedRequest("URLs are not fetched; send the image itself in base64")
    try:
        data = text.encode("ascii").translate(_STANDARD_ALPHABET, b" \t\r\n").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRequest(f"{name} is not valid base64") from None


def parse_form(body: bytes, content_type: bytes, *, max_parts: int) -> list[Upload]:
    """Return the parts of a ``multipart/form-data`` body (RFC 7578), with what RFC 2046, section 5.1 allows around them.

    The time grows with the length of the body alone. Raises MalformedRequest when the body is broken or has too many parts.
    """
    plain_type = _PLAIN_TYPE.fullmatch(content_type)
    boundary = plain_type[1] if plain_type else _parameters(content_type).get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise MalformedRequest(f"the Content-Type has no boundary of 1 to {_MAX_BOUNDARY_BYTES} bytes; let your client set it")
    delimiter = b"\r\n--" + boundary
    # The first delimiter needs no line before it. What comes before it, and after the last one, is ignored.
    start = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    if start == -1:
        raise MalformedRequest("the multipart body is broken; send it complete and with the boundary it declares")
    parts: list[Upload] = []
    while not body.startswith(b"--", after := start + len(delimiter)):
        if head := _PLAIN_HEAD.match(body, after):
            begin, (name, filename) = head.end(), head.groups()
        else:
            begin, name, filename = _read_head(body, after, delimiter)
        start = body.find(delimiter, begin - 2)
        if start < 0:
            raise MalformedRequest("the multipart body is cut short; send it complete, with its closing boundary")
        if len(parts) == max_parts:
            raise MalformedRequest(f"the form has more than {max_parts} parts; send fewer in one request")
        called = None if filename is None else filename.decode("utf-8", "replace")
        parts.append(Upload(body[begin:start], called, name.decode("utf-8", "replace")))
    return parts


def _read_head(body: bytes, after: int, delimiter: bytes) -> tuple[int, bytes, bytes | None]:
    """Return where the data of a part begins, its name, and its file's name; its headers follow ``body[:after]``."""
    line_end = _LINE_END.match(body, after)
    first = after if line_end is None else line_end.end() - 2
    blank_line = body.find(b"\r\n\r\n", first, first + _MAX_HEAD_BYTES)
    if line_end is None or blank_line < 0 or body.find(delimiter, first, blank_line + 2) >= 0:
        raise MalformedRequest("a part of the form is broken; send its headers, a blank line, and its data")
    disposition = _DISPOSITION.search(body, first, blank_line)
    parameters = {} if disposition is None else _parameters(disposition[1])
    if b"name" not in parameters:
        raise MalformedRequest("a part of the form has no name; the image's part is called 'file'")
    filename = parameters.get(b"filename")
    charset, _, extended = parameters.get(b"filename*", b"").partition(b"'")  # RFC 8187; preferred by RFC 6266
    if charset.lower() in (b"utf-8", b"iso-8859-1"):
        filename = unquote_to_bytes(extended.partition(b"'")[2]).decode(charset.decode(), "replace").encode()
    return blank_line + 4, parameters[b"name"], filename


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """Return the parameters of a header by their names in lower case."""
    found = {}
    for name, quoted, token in _PARAMETER.findall(header):
        found[name.lower()] = _ESCAPED.sub(rb"\1", quoted) if b"\\" in quoted else quoted or token
    return found
