"""The request line and the headers of an HTTP/1.1 request, with what the parser does not check."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import unquote

import httptools

from service.errors import MalformedRequest
from service.observability.request_record import Scope
from service.web.exchange import Headers

_HOST = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]*|\[[\w.:]+\])(?::\d*)?", re.ASCII)  # RFC 3986, section 3.2.2
_is_host = lru_cache(16)(_HOST.fullmatch)


def make_scope(method: bytes, url: bytes, version: str, headers: Headers, client: str | None, scheme: str) -> Scope:
    """Return the request; raise MalformedRequest for another version, and for a host or a framing that cannot be relied on."""
    if version not in ("1.1", "1.0"):
        raise MalformedRequest(f"this is HTTP/{version}; send HTTP/1.1")
    hosts = [value for name, value in headers if name == b"host"]
    if (hosts or version == "1.1") and not (len(hosts) == 1 and _is_host(hosts[0])):
        raise MalformedRequest("the request has no Host header, several, or one that is no host; send one")
    if version == "1.0":  # which knows no interim responses (RFC 9110, section 10.1.1)
        headers = [pair for pair in headers if pair[0] != b"expect"]
    scope = Scope(method.decode("ascii"), *_split_target(url), headers, client, scheme)
    coding = scope.header(b"transfer-encoding")
    if coding is not None and (coding.lower() != b"chunked" or version == "1.0"):  # RFC 9112, section 6.1
        raise MalformedRequest("the only Transfer-Encoding here is 'chunked', in HTTP/1.1; send that, or a Content-Length")
    return scope


@lru_cache(16)
def _split_target(url: bytes) -> tuple[str, bytes]:
    """Return the path, decoded, and the query of a request's target (RFC 9112, section 3.2)."""
    if not url.startswith(b"/"):
        try:
            parsed = httptools.parse_url(url)  # the absolute form, as proxies get it
            url = (parsed.path or b"/") + b"?" + (parsed.query or b"")
        except httptools.HttpParserInvalidURLError:
            return url.decode("latin-1"), b""
    raw, _, query = url.partition(b"?")
    path = raw.decode("latin-1")
    return unquote(path) if "%" in path else path, query
