"""The one tree of errors a caller can meet, each with its HTTP status and stable code; the docs say its first line.

A ``detail`` is written for the caller: it says what to do and never holds a path, a stack or an exception's text.
"""

from __future__ import annotations


class ServiceError(Exception):
    """A fault of the service itself; its log has more under the request's id."""

    status = 500
    code = "internal_error"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Headers that belong to the answer, besides ``Retry-After``."""

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        """``retry_after_s``, in whole seconds, goes out as ``Retry-After``."""
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class MalformedRequest(ServiceError):
    """The body or a parameter cannot be parsed."""

    status, code = 400, "malformed_request"


class Unauthorized(ServiceError):
    """API keys are configured and none or a wrong one was sent."""

    status, code = 401, "unauthorized"
    headers = ((b"www-authenticate", b"Bearer"),)


class NotFound(ServiceError):
    """No such path."""

    status, code = 404, "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""

    status, code = 405, "method_not_allowed"

    def __init__(self, detail: str, *, allowed: str = "") -> None:
        """Say which methods are ``allowed``, separated by commas."""
        super().__init__(detail)
        self.headers = ((b"allow", allowed.encode()),)


class RequestTimeout(ServiceError):
    """A client that takes too long to send its request."""

    status, code = 408, "request_timeout"


class HeadersTooLarge(ServiceError):
    """More bytes of headers than any client needs."""

    status, code = 431, "headers_too_large"


class BodyTooLarge(ServiceError):
    """More bytes than ``max_body_bytes``."""

    status, code = 413, "body_too_large"


class ImageTooLarge(ServiceError):
    """More pixels than ``max_image_pixels``, or memory for them than ``memory_budget_bytes``."""

    status, code = 413, "image_too_large"


class UnsupportedMediaType(ServiceError):
    """A Content-Type or an image format that is not accepted."""

    status, code = 415, "unsupported_media_type"


class MissingFile(ServiceError):
    """No part named ``file``."""

    status, code = 422, "missing_file"


class InvalidImage(ServiceError):
    """An empty, undecodable or truncated image."""

    status, code = 422, "invalid_image"


class InvalidParameter(ServiceError):
    """A well-formed parameter outside its range."""

    status, code = 422, "invalid_parameter"


class Overloaded(ServiceError):
    """The queue is full."""

    status, code = 429, "overloaded"


class RateLimited(ServiceError):
    """This caller asks too often."""

    status, code = 429, "rate_limited"


class InferenceFailed(ServiceError):
    """The device failed on this image, after the retry."""

    status, code = 500, "inference_failed"


class NotReady(ServiceError):
    """Starting, draining, or the engine is down."""

    status, code = 503, "not_ready"


class MemoryBudgetExceeded(ServiceError):
    """Bodies and decodes under way fill the memory budget."""

    status, code = 503, "memory_budget_exceeded"


class DeadlineExceeded(ServiceError):
    """The deadline passed, or could not have been met."""

    status, code = 504, "deadline_exceeded"


ERRORS: tuple[type[ServiceError], ...] = (ServiceError, *ServiceError.__subclasses__())
QUEUE_FULL = "the queue is full; retry after the time given"


def deadline_passed() -> DeadlineExceeded:
    """Make the error of a request whose deadline has passed."""
    return DeadlineExceeded("the deadline passed before the prediction was ready; retry, or allow more time")
