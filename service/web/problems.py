"""Errors as HTTP answers, in one place for every route: RFC 9457 ``application/problem+json``, or the path's own dialect.

Owns: the body of an error and its headers. Does not know: when an error is raised.
"""

from __future__ import annotations

import logging

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from service.errors import InvalidParameter, MethodNotAllowed, NotFound, ServiceError
from service.observability.request_id import request_id_of
from service.observability.request_record import note_refused

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


def problem(error: ServiceError, request_id: str) -> dict[str, str | int]:
    """Give the members of the problem, as in RFC 9457, section 3.1, with ``code`` and ``request_id``."""
    return {
        "type": f"urn:problem:{error.code.replace('_', '-')}",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request_id,
    }


def error_response(error: ServiceError, scope: Scope) -> Response:
    """Make the whole answer, in the dialect of the request's path, and note the refusal.

    The Open Inference Protocol has an error object of its own, and Hugging Face's clients show ``error`` and nothing else.
    """
    note_refused(scope, error.code)
    request_id, path = request_id_of(scope), scope["path"]
    if path == "/v2" or path.startswith("/v2/"):
        return _response(error, request_id, {"error": error.detail}, "application/json")
    if path == "/hf":
        return _response(error, request_id, problem(error, request_id) | {"error": error.detail}, MEDIA_TYPE)
    return _response(error, request_id, problem(error, request_id), MEDIA_TYPE)


def _response(error: ServiceError, request_id: str, content: dict[str, str | int], media_type: str) -> Response:
    """Add ``Retry-After`` where the error has one, and ``WWW-Authenticate`` with 401."""
    headers = {"X-Request-ID": request_id}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(content), error.status, headers, media_type)


def internal_error() -> ServiceError:
    """Make the error of a fault of ours; what happened is in the log and never in the answer."""
    return ServiceError("something went wrong here; retry, and report it with the request id if it stays")


def install_problem_handlers(app: FastAPI) -> None:
    """Make every error of FastAPI's own routes a problem too."""

    async def of_service(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError), "registered for this class"
        return error_response(error, request.scope)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class"
        if error.status_code == 404:
            return error_response(NotFound("there is nothing at this path; see /docs for what there is"), request.scope)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            response = error_response(MethodNotAllowed(f"this path answers {allowed or 'other methods'} only"), request.scope)
            response.headers["Allow"] = allowed
            return response
        translated = ServiceError(str(error.detail))
        translated.status = error.status_code
        return error_response(translated, request.scope)

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for this class"
        problems = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors())
        return error_response(InvalidParameter(problems), request.scope)

    async def of_anything(request: Request, error: Exception) -> Response:
        request_id = request_id_of(request.scope)
        logger.error("request failed path=%s request_id=%s", request.url.path, request_id, exc_info=error)
        return error_response(internal_error(), request.scope)

    app.add_exception_handler(ServiceError, of_service)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(Exception, of_anything)
