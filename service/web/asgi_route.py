"""A FastAPI route whose endpoint speaks ASGI itself.

Owns: putting a bare ASGI callable in the place of FastAPI's request handling. Does not know: any endpoint.

FastAPI's handling of one upload (form parsing into files, dependencies, response validation) costs several times what the
rest of the HTTP path does. Such a route stays in the application's router and in its OpenAPI document, by the same
declaration as every other, and answers by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import Parameter, Signature
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

AsgiEndpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


class AsgiRoute(APIRoute):
    """Declared as an ``APIRoute`` (models, responses, ``openapi_extra``), answered by ``asgi``.

    ``request_model`` documents a JSON body; the path's parameters are documented as text.
    """

    def __init__(
        self, path: str, asgi: AsgiEndpoint, *, name: str, request_model: type[BaseModel] | None = None, **declaration: Any
    ) -> None:
        def endpoint() -> None:
            """Stand for the operation in FastAPI's declaration; never called."""

        annotations: dict[str, type] = dict.fromkeys(compile_path(path)[2], str)
        if request_model is not None:
            annotations["body"] = request_model
        endpoint.__signature__ = Signature(  # type: ignore[attr-defined]  # what inspect, and so FastAPI, looks at
            [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in annotations.items()]
        )
        endpoint.__doc__ = declaration.pop("description", None)
        super().__init__(path, endpoint, name=name, description=endpoint.__doc__, **declaration)
        self.app: ASGIApp = asgi
