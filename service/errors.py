"""The one tree of errors a caller can meet, each with its HTTP status and stable code; the docs say its first line.

A ``detail`` is written for the caller: it says what to do and never holds a path, a stack or an exception's text.
"""

from __future__ import annotations

import re


class ServiceError(Exception):
    """A fault of the service itself; its log has more under the request's id."""

    status = 500
    code = "internal_error"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Headers that belong to the answer, besides ``Retry-After``."""

    def __init_subclass__(cls, *, status: int) -> None:
        """Set the status, and the code: the name of the class in snake case, which clients rely on."""
        cls.status, cls.code = status, re.sub(r"\B[A-Z]", r"_\g<0>", cls.__name__).lower()

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        """``retry_after_s``, in whole seconds, goes out as ``Retry-After``."""
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class MalformedRequest(ServiceError, status=400):
    """The body or a parameter cannot be parsed."""


class Unauthorized(ServiceError, status=401):
    """API keys are configured and none or a wrong one was sent."""

    headers = ((b"www-authenticate", b"Bearer"),)


class NotFound(ServiceError, status=404):
    """No such path."""


class MethodNotAllowed(ServiceError, status=405):
    """The path exists, but not for this method."""

    def __init__(self, detail: str, *, allowed: str = "") -> None:
        """Say which methods are ``allowed``, separated by commas."""
        super().__init__(detail)
        self.headers = ((b"allow", allowed.encode()),)


class RequestTimeout(ServiceError, status=408):
    """A client that takes too long to send its request."""


class HeadersTooLarge(ServiceError, status=431):
    """More bytes of headers than any client needs."""


class BodyTooLarge(ServiceError, status=413):
    """More bytes than ``max_body_bytes``."""


class ImageTooLarge(ServiceError, status=413):
    """More pixels than ``max_image_pixels``, or memory for them than ``memory_budget_bytes``."""


class UnsupportedMediaType(ServiceError, status=415):
    """A Content-Type or an image format that is not accepted."""


class MissingFile(ServiceError, status=422):
    """No part named ``file``."""


class InvalidImage(ServiceError, status=422):
    """An empty, undecodable or truncated image."""


class InvalidParameter(ServiceError, status=422):
    """A well-formed parameter outside its range."""


class Overloaded(ServiceError, status=429):
    """The queue is full."""


class RateLimited(ServiceError, status=429):
    """This caller asks too often."""


class InferenceFailed(ServiceError, status=500):
    """The device failed on this image, after the retry."""


class NotReady(ServiceError, status=503):
    """Starting, draining, or the engine is down."""


class MemoryBudgetExceeded(ServiceError, status=503):
    """Bodies and decodes under way fill the memory budget."""


class DeadlineExceeded(ServiceError, status=504):
    """The deadline passed, or could not have been met."""


ERRORS: tuple[type[ServiceError], ...] = (ServiceError, *ServiceError.__subclasses__())
QUEUE_FULL = "the queue is full; retry after the time given"


def deadline_passed() -> DeadlineExceeded:
    """Make the error of a request whose deadline has passed."""
    return DeadlineExceeded("the deadline passed before the prediction was ready; retry, or allow more time")
