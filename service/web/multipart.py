"""The parts of a ``multipart/form-data`` body (RFC 7578), with what RFC 2046, section 5.1 allows around them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from service.errors import MalformedRequest

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
class Part:
    """One part of a form: ``data`` are its bytes, ``filename`` what the client called the file, if anything."""

    name: str
    filename: str | None
    data: bytes


def parse_form(body: bytes, content_type: bytes, *, max_parts: int) -> list[Part]:
    """Return the parts of a ``multipart/form-data`` body.

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
    parts: list[Part] = []
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
        name_text = name.decode("utf-8", "replace")
        parts.append(Part(name_text, None if filename is None else filename.decode("utf-8", "replace"), body[begin:start]))
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
