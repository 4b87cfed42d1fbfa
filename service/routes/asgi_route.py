"""A FastAPI route whose endpoint speaks ASGI itself.

Owns: putting a bare ASGI callable in the place of FastAPI's request handling. Does not know: any endpoint.

FastAPI's handling of one upload (form parsing into files, dependencies, response validation) costs several times what the
rest of the HTTP path does. Such a route stays in the application's router and in its OpenAPI document, by the same
declaration as every other, and answers by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

AsgiEndpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


class AsgiRoute(APIRoute):
    """Declared as an ``APIRoute`` (models, responses, ``openapi_extra``), answered by ``asgi``."""

    def __init__(self, path: str, asgi: AsgiEndpoint, *, name: str, **declaration: Any) -> None:
        def endpoint() -> None:
            """Stand for the operation in FastAPI's declaration; never called."""

        endpoint.__doc__ = declaration.pop("description", None)
        super().__init__(path, endpoint, name=name, description=endpoint.__doc__, **declaration)
        self.app: ASGIApp = asgi
