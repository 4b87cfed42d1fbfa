"""Errors as HTTP answers, for every route: RFC 9457 ``application/problem+json``, or the dialect of the path."""

from __future__ import annotations

import orjson

from service.errors import ServiceError
from service.web.reply import Headers, Reply

MEDIA_TYPE = "application/problem+json"


def problem(error: ServiceError, request_id: str) -> dict[str, str | int]:
    """Members of the problem, as in RFC 9457, section 3.1, with ``code`` and ``request_id``."""
    return {
        "type": f"urn:problem:{error.code.replace('_', '-')}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request_id,
    }


def error_reply(error: ServiceError, request_id: str, path: str = "") -> Reply:
    """Make the answer, in the dialect of the request's path, with the headers that belong to its status.

    The Open Inference Protocol has an error object of its own, and Hugging Face's clients show ``error`` and nothing else.
    """
    headers: Headers = [*error.headers]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if path == "/v2" or path.startswith("/v2/"):
        return Reply(orjson.dumps({"error": error.detail}), headers, b"application/json", error.status)
    content = problem(error, request_id)
    if path == "/hf":
        content["error"] = error.detail
    return Reply(orjson.dumps(content), headers, MEDIA_TYPE.encode(), error.status)


def internal_error() -> ServiceError:
    """Make the error of a fault of ours; what happened is in the log and never in the answer."""
    return ServiceError("something went wrong here; retry, and report it with the request id if it stays")
