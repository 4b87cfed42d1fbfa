"""FastAPI behind the entry: it documents every route and answers those that are no load.

Its handling of one upload (form parsing into files, dependencies, response validation) costs several times what the rest of a
request does, so ``DocumentedRoute`` declares a route to FastAPI that a handler of ours answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Any, Never
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message

from service.errors import InvalidParameter, MethodNotAllowed, NotFound, ServiceError
from service.web.exchange import Exchange, Handler, in_task
from service.web.reply import Reply


class DocumentedRoute(APIRoute):
    """Declared as an ``APIRoute`` (models, responses, ``openapi_extra``), answered by ``handler``.

    ``request_model`` documents a JSON body; the path's parameters are documented as text.
    """

    def __init__(
        self, path: str, handler: Handler, *, name: str, request_model: type[BaseModel] | None = None, **declaration: Any
    ) -> None:
        def endpoint() -> None:
            """Stand for the operation in FastAPI's declaration; never called."""

        annotations: dict[str, type] = dict.fromkeys(compile_path(path)[2], str)
        if request_model is not None:
            annotations["body"] = request_model
        endpoint.__signature__ = Signature(  # type: ignore[attr-defined]  # what inspect, and so FastAPI, reads
            [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in annotations.items()]
        )
        endpoint.__doc__ = declaration.pop("description", None)
        super().__init__(
            path,
            endpoint,
            name=name,
            methods=["POST"],
            description=endpoint.__doc__,
            generate_unique_id_function=operation_id,
            **declaration,
        )
        parameters = (self.openapi_extra or {}).get("parameters", [])
        query_names = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]

        def checked(exchange: Exchange) -> None:
            if exchange.scope.query:
                _check_query(exchange.scope.query, query_names)
            handler(exchange)

        self.handler: Handler = checked


async def declared_query(request: Request) -> None:
    """Raise InvalidParameter for query parameters that the route does not declare; a dependency of routes."""
    query = request.scope["query_string"]
    if query:
        _check_query(query, [field.alias for field in request.scope["route"].dependant.query_params])


def _check_query(query: bytes, known: Sequence[str]) -> None:
    if not parse_qs(query.decode("latin-1"), keep_blank_values=True).keys() <= set(known):
        takes = f"only the query parameters {', '.join(known)}" if known else "no query parameters"
        raise InvalidParameter(f"this path takes {takes}; leave out the others")


def operation_id(route: APIRoute) -> str:
    """Return the name of a method for ``route``: ``predictBatch`` for ``predict_batch``."""
    first, *rest = route.name.split("_")
    return first + "".join(map(str.capitalize, rest)) + ("OfVersion" if "{model_version}" in route.path else "")


def framework_handler(app: ASGIApp, root_path: str) -> Handler:
    """Make a handler that has the ASGI application ``app`` answer; a carrier sends the answer of GET to HEAD, without body."""

    async def handle(exchange: Exchange) -> Reply:
        scope, messages = exchange.scope, list[Message]()
        asgi = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET" if scope.method == "HEAD" else scope.method,
            "path": root_path + scope.path,
            "raw_path": (root_path + scope.path).encode(),
            "root_path": root_path,
            "query_string": scope.query,
            "headers": scope.headers,
            "client": (scope.client, 0) if scope.client else None,
            "server": None,
            "scheme": scope.scheme,
            "state": {},
        }

        async def receive() -> Message:
            return {"type": "http.request", "body": exchange.body, "more_body": False}

        async def send(message: Message) -> None:
            messages.append(message)

        try:
            await app(asgi, receive, send)
        finally:
            exchange.record.route = getattr(asgi.get("route"), "path", "")
        body = b"".join(message.get("body", b"") for message in messages[1:])
        headers = [(name, value) for name, value in messages[0]["headers"] if name != b"content-length"]
        return Reply(body, headers, b"", messages[0]["status"])

    return in_task(handle)


def raise_service_errors(app: FastAPI) -> None:
    """Have every error of FastAPI's own leave ``app`` as a ServiceError, which the exchange is refused with."""

    async def of_http(request: Request, error: Exception) -> Never:
        assert isinstance(error, HTTPException), "registered for this class"
        if error.status_code == 404:
            raise NotFound("there is nothing at this path; see /docs for what there is")
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "").replace("GET", "GET, HEAD")
            raise MethodNotAllowed(f"this path answers {allowed or 'other methods'} only", allowed=allowed)
        translated = ServiceError(str(error.detail))
        translated.status = error.status_code
        raise translated

    async def of_validation(request: Request, error: Exception) -> Never:
        assert isinstance(error, RequestValidationError), "registered for this class"
        raise InvalidParameter("; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors()))

    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
