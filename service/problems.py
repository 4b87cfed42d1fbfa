"""Errors as HTTP answers: RFC 9457 ``application/problem+json``, in one place for every route.

Owns: the body of an error and its headers. Does not know: when an error is raised.
"""

from __future__ import annotations

import logging

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.errors import InvalidParameter, MethodNotAllowed, NotFound, ServiceError
from service.request_id import request_id_of

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


def problem_response(error: ServiceError, request_id: str) -> Response:
    """Make the whole answer, with ``Retry-After`` where the error has one and ``WWW-Authenticate`` with 401."""
    headers = {"X-Request-ID": request_id}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(problem(error, request_id)), error.status, headers, MEDIA_TYPE)


def internal_error() -> ServiceError:
    """Make the error of a fault of ours; what happened is in the log and never in the answer."""
    return ServiceError("something went wrong here; retry, and report it with the request id if it stays")


def install_problem_handlers(app: FastAPI) -> None:
    """Make every error of FastAPI's own routes a problem too."""

    def of_service(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError), "registered for this class"
        return problem_response(error, request_id_of(request.scope))

    def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class"
        request_id = request_id_of(request.scope)
        if error.status_code == 404:
            return problem_response(NotFound("there is nothing at this path; see /docs for what there is"), request_id)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            response = problem_response(MethodNotAllowed(f"this path answers {allowed or 'other methods'} only"), request_id)
            response.headers["Allow"] = allowed
            return response
        translated = ServiceError(str(error.detail))
        translated.status = error.status_code
        return problem_response(translated, request_id)

    def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for this class"
        problems = "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors())
        return problem_response(InvalidParameter(problems), request_id_of(request.scope))

    def of_anything(request: Request, error: Exception) -> Response:
        request_id = request_id_of(request.scope)
        logger.error("request failed path=%s request_id=%s", request.url.path, request_id, exc_info=error)
        return problem_response(internal_error(), request_id)

    app.add_exception_handler(ServiceError, of_service)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(Exception, of_anything)
