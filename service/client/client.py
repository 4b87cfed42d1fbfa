"""A client of the service for Python programs: ``Client``, and ``AsyncClient`` with the same methods to await.

Needs httpx, which the ``client`` extra brings; the service itself never imports this.

>>> with Client("http://localhost:8000") as client:
...     print(client.predict("tom.jpg").label)
"""

from __future__ import annotations

import asyncio
import math
import os
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar, Unpack
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from service.answers import OptionArguments
from service.client.retry import RetryPolicy, Tries, retry_after_s
from service.image_files import Image, read_image
from service.schemas import Answer, BatchAnswer, FailedEntry, Health, Labels, Problem

_Body = TypeVar("_Body", bound=BaseModel)
_Http = TypeVar("_Http", httpx.Client, httpx.AsyncClient)
_BODY_LIMIT_SHOWN = 200
_BINARY = "application/octet-stream"
DEFAULT_RETRY = RetryPolicy()
_ONE_TRY = RetryPolicy(max_tries=1, max_total_s=math.inf)

_Request = dict[str, Any]  # arguments of ``httpx.Client.request``
_LABELS: _Request = {"method": "GET", "url": "/labels"}
_HEALTH: _Request = {"method": "GET", "url": "/health"}


class ClientError(Exception):
    """A request that got no answer; the message says why and what to do."""


class ServiceUnreachable(ClientError):
    """Nothing answered in time at the address."""


class UnexpectedAnswer(ClientError):
    """Something answered that is not this service."""


class ServiceProblem(ClientError):
    """The service refused: ``status``, ``code`` and ``detail`` as in docs/api.md.

    ``request_id`` is what the service's log has too. ``retry_after_s`` is set where the service says when to come again. What
    stands before the service, such as a load balancer, sends no problem: its ``code`` is ``http_error`` and its id is empty.
    """

    def __init__(self, status: int, code: str, detail: str, request_id: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class _Connections(Generic[_Http]):
    """What both clients have: their options, and connections to the service."""

    _kind: type[_Http]
    _http: _Http

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        timeout_s: float = 30.0,
        retry: RetryPolicy = DEFAULT_RETRY,
        ca_file: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        """Raise ValueError when ``url`` is no address; a scheme may be missing. Nothing is sent yet.

        The service's certificate is checked by the authorities in ``ca_file`` (PEM), by default those that are usual; not at
        all without ``verify``.
        """
        self._timeout_s, self._retry = timeout_s, retry
        trust = verify if ca_file is None or not verify else ssl.create_default_context(cafile=ca_file)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = self._kind(base_url=_address(url), headers=headers, verify=trust)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn an error of the network into ServiceUnreachable."""
        try:
            yield
        except httpx.RequestError as error:
            why = f"no answer from {self._http.base_url}: {str(error) or type(error).__name__}"
            raise ServiceUnreachable(f"{why}; check that the service runs there") from error


class Client(_Connections[httpx.Client], AbstractContextManager["Client"]):
    """Asks the service at ``url``; may be used by several threads at once, and keeps connections open until closed.

    A refusal with 429 or 503 is tried again as ``retry`` says. ``timeout_s`` bounds each wait for the network.
    """

    _kind = httpx.Client

    def predict(self, image: Image, **options: Unpack[OptionArguments]) -> Answer:
        """Classify one image; see ``OptionArguments``.

        Raises OSError for a file that cannot be read, ServiceProblem for a refusal, ServiceUnreachable, UnexpectedAnswer.
        """
        return _body_of(self._send(_prediction(image, options)), Answer)

    def predict_batch(self, images: Sequence[Image], **options: Unpack[OptionArguments]) -> list[Answer | FailedEntry]:
        """Classify several images in one request; return one entry for each, in order. Raises as ``predict`` does.

        An image that cannot be classified has a FailedEntry and fails no other.
        """
        return _body_of(self._send(_batch(images, options)), BatchAnswer).results if images else []

    def labels(self) -> Labels:
        """Return the class names, in the order of the network's outputs. Raises as ``predict`` does, but OSError."""
        return _body_of(self._send(_LABELS), Labels)

    def health(self) -> Health:
        """Return the service's state at once: what is not ready answers too. Raises as ``labels`` does."""
        return _body_of(self._send(_HEALTH, _ONE_TRY), Health, or_status=503)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __exit__(self, *error: object) -> None:
        """Close the connections."""
        self.close()

    def _send(self, request: _Request, retry: RetryPolicy | None = None) -> httpx.Response:
        """Send a request until it is answered for good."""
        tries = Tries(retry or self._retry)
        while True:
            with self._reaching():
                response = self._http.request(**request, timeout=min(self._timeout_s, tries.left_s))
            wait_s = tries.wait_s(response.status_code, response.headers.get("Retry-After"))
            if wait_s is None:
                return response
            time.sleep(wait_s)


class AsyncClient(_Connections[httpx.AsyncClient], AbstractAsyncContextManager["AsyncClient"]):
    """``Client`` for asyncio: the same methods and errors, to await."""

    _kind = httpx.AsyncClient

    async def predict(self, image: Image, **options: Unpack[OptionArguments]) -> Answer:
        """See ``Client.predict``."""
        return _body_of(await self._send(await asyncio.to_thread(_prediction, image, options)), Answer)

    async def predict_batch(self, images: Sequence[Image], **options: Unpack[OptionArguments]) -> list[Answer | FailedEntry]:
        """See ``Client.predict_batch``."""
        if not images:
            return []
        return _body_of(await self._send(await asyncio.to_thread(_batch, images, options)), BatchAnswer).results

    async def labels(self) -> Labels:
        """See ``Client.labels``."""
        return _body_of(await self._send(_LABELS), Labels)

    async def health(self) -> Health:
        """See ``Client.health``."""
        return _body_of(await self._send(_HEALTH, _ONE_TRY), Health, or_status=503)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aexit__(self, *error: object) -> None:
        """Close the connections."""
        await self.close()

    async def _send(self, request: _Request, retry: RetryPolicy | None = None) -> httpx.Response:
        """Send a request until it is answered for good."""
        tries = Tries(retry or self._retry)
        while True:
            with self._reaching():
                response = await self._http.request(**request, timeout=min(self._timeout_s, tries.left_s))
            wait_s = tries.wait_s(response.status_code, response.headers.get("Retry-After"))
            if wait_s is None:
                return response
            await asyncio.sleep(wait_s)


def _address(url: str) -> str:
    full = url if "//" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that does not close
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is not an address of a service; give one like http://localhost:8000")
    return full


def _prediction(image: Image, options: OptionArguments) -> _Request:
    """Read the image; return the request to classify it."""
    data, name = read_image(image)
    sent = {"content": data, "headers": {"Content-Type": _BINARY}} if name is None else {"files": [_file(data, name)]}
    return {"method": "POST", "url": "/predict", "params": _named(options), **sent}


def _batch(images: Sequence[Image], options: OptionArguments) -> _Request:
    """Read the images; return the request to classify them."""
    files = [_file(*read_image(image), str(index)) for index, image in enumerate(images)]
    return {"method": "POST", "url": "/predict/batch", "params": _named(options), "files": files}


def _named(options: OptionArguments) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _file(data: bytes, name: str | None, default: str = "") -> tuple[str, tuple[str, bytes, str]]:
    """Part of a multipart form."""
    return "file", (default if name is None else name, data, _BINARY)


def _body_of(response: httpx.Response, kind: type[_Body], *, or_status: int = 200) -> _Body:
    """Read the answer; raise ServiceProblem for a refusal and UnexpectedAnswer for what is neither.

    A body with ``or_status`` is an answer too, unless a load balancer made it.
    """
    if response.status_code in (200, or_status):
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            if response.status_code == 200:
                raise UnexpectedAnswer(
                    f"what answers at {response.url} is not this service, or another version of it: {_shown(response)}"
                ) from error
    raise _problem_of(response)


def _problem_of(response: httpx.Response) -> ServiceProblem:
    told_s = retry_after_s(response.headers.get("Retry-After"))
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        detail = f"{response.reason_phrase or 'no reason'}, and no problem document: {_shown(response)}"
        return ServiceProblem(response.status_code, "http_error", detail, "", told_s)
    return ServiceProblem(response.status_code, problem.code, problem.detail, problem.request_id, told_s)


def _shown(response: httpx.Response) -> str:
    return repr(response.text[:_BODY_LIMIT_SHOWN])
