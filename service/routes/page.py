"""``GET /``, ``GET /docs`` and ``GET /page/...``: the pages for people, static files with strict headers.

``/docs`` is Swagger UI from the package fastapi-offline, so it needs no internet.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from starlette.responses import HTMLResponse

from service.errors import NotFound
from service.web.content_encoding import preferred_encoding
from service.web.exchange import Exchange, Reply
from service.web.route import Route

_FOLDER = Path(__file__).parents[1] / "page"
_SWAGGER = "swagger/"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

SECURITY_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            # Docker Spaces show their page in a frame. It has no session that a foreign frame could act in.
            "frame-ancestors 'self' https://huggingface.co",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


# Swagger UI has pictures in its style sheet, and writes the descriptions' HTML, cleaned, into the page.
_DOCS_POLICY = SECURITY_HEADERS["Content-Security-Policy"].replace("blob:", "blob: data:").partition("; require-trusted")[0]


def page_routes() -> list[Route]:
    """Declare the routes; a file is read once, when it is asked for."""
    files = {path.relative_to(_FOLDER).as_posix(): path for path in _FOLDER.rglob("*") if path.suffix in _MEDIA_TYPES}
    package = find_spec("fastapi_offline")  # imported, it would only import more of FastAPI
    for folder in package.submodule_search_locations or [] if package is not None else []:
        files |= {_SWAGGER + path.name: path for path in Path(folder, "static").glob("swagger-ui*")}

    def serve(name: str | None, exchange: Exchange) -> Reply:
        scope = exchange.scope
        name = name or scope.params["name"]
        if name not in files:
            raise NotFound("the page has no such file; it begins at /")
        data, zipped, etag = _read(files[name])
        media_type = _MEDIA_TYPES[files[name].suffix].encode()
        # Asked again each time and mostly answered with 304: a new version of the service brings its own page at once.
        headers = {"ETag": etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding", **SECURITY_HEADERS}
        if name == "docs.html":
            headers["Content-Security-Policy"] = _DOCS_POLICY
        lines = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        known = scope.header(b"if-none-match") or b""
        if known == b"*" or etag.removeprefix("W/").encode() in known:
            return Reply(b"", lines, b"", 304)
        if preferred_encoding(scope.header(b"accept-encoding"), b"gzip") == b"gzip":
            return Reply(zipped, [*lines, (b"content-encoding", b"gzip")], media_type)
        return Reply(data, lines, media_type)

    return [
        Route(
            "/",
            partial(serve, "index.html"),
            operation_id="index",
            any_query=True,
            tags=["page"],
            summary="The page for people",
            response_class=HTMLResponse,
        ),
        Route("/docs", partial(serve, "docs.html"), any_query=True, include_in_schema=False),
        Route("/page/{name:path}", partial(serve, None), any_query=True, include_in_schema=False),
    ]


@cache
def _read(path: Path) -> tuple[bytes, bytes, str]:
    """Return a file, the same compressed, and its ETag, which is weak since it is the same for both."""
    data = path.read_bytes()
    return data, gzip.compress(data, mtime=0), f'W/"{hashlib.sha256(data).hexdigest()[:32]}"'
