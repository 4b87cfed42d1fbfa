"""``GET /`` and ``GET /page/...``: the page for people, static files with strict headers.

Owns: which files there are, their headers. Does not know: what the page does; it uses the API like any other client.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from service.errors import NotFound

_FOLDER = Path(__file__).parents[1] / "page"
_INDEX = "index.html"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
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


@dataclass(frozen=True)
class _File:
    data: bytes
    zipped: bytes  # empty for what is compressed already
    media_type: str
    etag: str


def page_router() -> APIRouter:
    """Declare the routes; the files are read once, here."""
    router = APIRouter()
    files = {path.relative_to(_FOLDER).as_posix(): _read(path) for path in _FOLDER.rglob("*") if path.suffix in _MEDIA_TYPES}

    def serve(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise NotFound("the page has no such file; it begins at /")
        # Asked again each time and mostly answered with 304: a new version of the service brings its own page at once.
        headers = {"ETag": file.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding", **SECURITY_HEADERS}
        if file.etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        if file.zipped and "gzip" in request.headers.get("Accept-Encoding", ""):
            return Response(file.zipped, headers={**headers, "Content-Encoding": "gzip"}, media_type=file.media_type)
        return Response(file.data, headers=headers, media_type=file.media_type)

    @router.get("/", tags=["page"], response_class=HTMLResponse, summary="The page for people")
    async def index(request: Request) -> Response:
        return serve(request, _INDEX)

    @router.get("/page/{name:path}", include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        return serve(request, name)

    return router


def _read(path: Path) -> _File:
    data = path.read_bytes()
    zipped = gzip.compress(data, mtime=0) if path.suffix != ".png" else b""
    # Weak, since it is the same for both encodings.
    return _File(data, zipped, _MEDIA_TYPES[path.suffix], f'W/"{hashlib.sha256(data).hexdigest()[:32]}"')
