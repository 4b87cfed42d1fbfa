"""The limit of HTTP in this stack: uvicorn, and a bare ASGI callable that cuts the form and answers a constant."""

from __future__ import annotations

import sys

import uvicorn
from starlette.types import Receive, Scope, Send

from service.routes.uploads import parse_form

_ANSWER = b'{"label": "cat", "score": 0.97, "predictions": [{"label": "cat", "score": 0.97}], "filename": "image.jpg"}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_ANSWER))]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every request alike."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if body:
        parse_form(bytes(body), dict(scope["headers"])[b"content-type"], max_parts=2)
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _ANSWER})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), lifespan="off", log_config=None, access_log=False)
