"""The one tree of errors a caller can meet, each with its HTTP status and stable code; the docs say its first line.

A ``detail`` is written for the caller: it says what to do and never holds a path, a stack or an exception's text.
"""

from __future__ import annotations


class ServiceError(Exception):
    """A fault of the service itself; its log has more under the request's id."""

    status = 500
    code = "internal_error"
    title = "Internal error"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Headers that belong to the answer, besides ``Retry-After``."""

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        """``retry_after_s``, in whole seconds, goes out as ``Retry-After``."""
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class MalformedRequest(ServiceError):
    """The body or a parameter cannot be parsed."""

    status, code, title = 400, "malformed_request", "Malformed request"


class Unauthorized(ServiceError):
    """API keys are configured and none or a wrong one was sent."""

    status, code, title = 401, "unauthorized", "Unauthorized"
    headers = ((b"www-authenticate", b"Bearer"),)


class NotFound(ServiceError):
    """No such path."""

    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"

    def __init__(self, detail: str, *, allowed: str = "") -> None:
        """Say which methods are ``allowed``, separated by commas."""
        super().__init__(detail)
        self.headers = ((b"allow", allowed.encode()),)


class RequestTimeout(ServiceError):
    """A client that takes too long to send its request."""

    status, code, title = 408, "request_timeout", "Request timeout"


class HeadersTooLarge(ServiceError):
    """More bytes of headers than any client needs."""

    status, code, title = 431, "headers_too_large", "Headers too large"


class BodyTooLarge(ServiceError):
    """More bytes than ``max_body_bytes``."""

    status, code, title = 413, "body_too_large", "Body too large"


class ImageTooLarge(ServiceError):
    """More pixels than ``max_image_pixels``."""

    status, code, title = 413, "image_too_large", "Image too large"


class UnsupportedMediaType(ServiceError):
    """A Content-Type or an image format that is not accepted."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class MissingFile(ServiceError):
    """No part named ``file``."""

    status, code, title = 422, "missing_file", "Missing file"


class InvalidImage(ServiceError):
    """An empty, undecodable or truncated image."""

    status, code, title = 422, "invalid_image", "Invalid image"


class InvalidParameter(ServiceError):
    """A well-formed parameter outside its range."""

    status, code, title = 422, "invalid_parameter", "Invalid parameter"


class Overloaded(ServiceError):
    """The queue is full."""

    status, code, title = 429, "overloaded", "Overloaded"


class RateLimited(ServiceError):
    """This caller asks too often."""

    status, code, title = 429, "rate_limited", "Rate limited"


class InferenceFailed(ServiceError):
    """The device failed on this image, after the retry."""

    status, code, title = 500, "inference_failed", "Inference failed"


class NotReady(ServiceError):
    """Starting, draining, or the engine is down."""

    status, code, title = 503, "not_ready", "Not ready"


class MemoryBudgetExceeded(ServiceError):
    """Bodies and decodes under way fill the memory budget."""

    status, code, title = 503, "memory_budget_exceeded", "Memory budget exceeded"


class DeadlineExceeded(ServiceError):
    """The deadline passed, or could not have been met."""

    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"


QUEUE_FULL = "the queue is full; retry after the time given"


def deadline_passed() -> DeadlineExceeded:
    """Make the error of a request whose deadline has passed."""
    return DeadlineExceeded("the deadline passed before the prediction was ready; retry, or allow more time")
