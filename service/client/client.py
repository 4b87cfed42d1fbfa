"""A client of the service for Python programs: ``Client``, and ``AsyncClient`` with the same methods to await.

Needs httpx, which the ``client`` extra brings; the service itself never imports this.

>>> with Client("http://localhost:8000") as client:
...     print(client.predict("tom.jpg").label)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from service.client.retry import RetryPolicy, Tries, retry_after_s
from service.schemas import Answer, BatchAnswer, FailedEntry, Health, Labels, Problem

Image = str | os.PathLike[str] | bytes
"""An image file by its path, or its bytes as they would be in a file."""

Unknown = Literal["flag", "reject"]
"""With ``reject`` an image that is not known has no label."""

_Body = TypeVar("_Body", bound=BaseModel)
_BODY_LIMIT_SHOWN = 200
_BINARY = "application/octet-stream"
DEFAULT_RETRY = RetryPolicy()


class ClientError(Exception):
    """A request that got no answer; the message says why and what to do."""


class ServiceUnreachable(ClientError):
    """Nothing answered in time at the address."""


class UnexpectedAnswer(ClientError):
    """Something answered that is not this service."""


class ServiceProblem(ClientError):
    """The service refused: ``status``, ``code`` and ``detail`` as in the README's table of errors.

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


_Query = dict[str, int | float | str]
_Call = dict[str, Any]
"""Arguments of one request as httpx has them, the timeout excepted; a request that is retried sends the same."""


_LABELS: _Call = {"method": "GET", "url": "/labels"}
_HEALTH: _Call = {"method": "GET", "url": "/health"}


class Client:
    """Asks the service at ``url``; may be used by several threads at once, and keeps connections open until closed.

    A refusal with 429 or 503 is tried again as ``retry`` says. ``timeout_s`` bounds each wait for the network.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 30.0, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        """Raise ValueError when ``url`` is no address; a scheme may be missing. Nothing is sent yet."""
        self._timeout_s, self._retry = timeout_s, retry
        self._http = httpx.Client(base_url=_address(url), headers=_headers(api_key))

    def predict(
        self, image: Image, *, top_k: int | None = None, unknown: Unknown | None = None, threshold: float | None = None
    ) -> Answer:
        """Classify one image; what is None is the service's default.

        ``top_k`` is how many classes the answer holds. An image whose typicality is below ``threshold`` (0 to 1) is not
        ``known``; with ``unknown="reject"`` its label and score are None.
        Raises OSError for a file that cannot be read, ServiceProblem for a refusal, ServiceUnreachable, UnexpectedAnswer.
        """
        return _body_of(self._send(_predict_call(image, _query(top_k, unknown, threshold))), Answer)

    def predict_batch(
        self,
        images: Sequence[Image],
        *,
        top_k: int | None = None,
        unknown: Unknown | None = None,
        threshold: float | None = None,
    ) -> list[Answer | FailedEntry]:
        """Classify several images in one request; give one entry for each, in order. Raises as ``predict`` does.

        An image that cannot be classified has a FailedEntry and fails no other.
        """
        if not images:
            return []
        return _body_of(self._send(_batch_call(images, _query(top_k, unknown, threshold))), BatchAnswer).results

    def labels(self) -> Labels:
        """Give the class names, in the order of the network's outputs. Raises as ``predict`` does, but OSError."""
        return _body_of(self._send(_LABELS), Labels)

    def health(self) -> Health:
        """Give the service's state at once: what is not ready answers too. Raises as ``labels`` does."""
        return _health_of(self._send_once(_HEALTH, self._timeout_s))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Give the client itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close the connections."""
        self.close()

    def _send(self, call: _Call) -> httpx.Response:
        tries = Tries(self._retry)
        while True:
            response = self._send_once(call, min(self._timeout_s, tries.left_s))
            wait_s = tries.wait_s(response.status_code, response.headers.get("Retry-After"))
            if wait_s is None:
                return response
            time.sleep(wait_s)

    def _send_once(self, call: _Call, timeout_s: float) -> httpx.Response:
        try:
            return self._http.request(**call, timeout=timeout_s)
        except httpx.RequestError as error:
            raise _unreachable(self._http.base_url, error) from error


class AsyncClient:
    """``Client`` for asyncio: the same methods and errors, to await."""

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 30.0, retry: RetryPolicy = DEFAULT_RETRY) -> None:
        """See ``Client``."""
        self._timeout_s, self._retry = timeout_s, retry
        self._http = httpx.AsyncClient(base_url=_address(url), headers=_headers(api_key))

    async def predict(
        self, image: Image, *, top_k: int | None = None, unknown: Unknown | None = None, threshold: float | None = None
    ) -> Answer:
        """See ``Client.predict``."""
        return _body_of(
            await self._send(await asyncio.to_thread(_predict_call, image, _query(top_k, unknown, threshold))), Answer
        )

    async def predict_batch(
        self,
        images: Sequence[Image],
        *,
        top_k: int | None = None,
        unknown: Unknown | None = None,
        threshold: float | None = None,
    ) -> list[Answer | FailedEntry]:
        """See ``Client.predict_batch``."""
        if not images:
            return []
        call = await asyncio.to_thread(_batch_call, images, _query(top_k, unknown, threshold))
        return _body_of(await self._send(call), BatchAnswer).results

    async def labels(self) -> Labels:
        """See ``Client.labels``."""
        return _body_of(await self._send(_LABELS), Labels)

    async def health(self) -> Health:
        """See ``Client.health``."""
        return _health_of(await self._send_once(_HEALTH, self._timeout_s))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Give the client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()

    async def _send(self, call: _Call) -> httpx.Response:
        tries = Tries(self._retry)
        while True:
            response = await self._send_once(call, min(self._timeout_s, tries.left_s))
            wait_s = tries.wait_s(response.status_code, response.headers.get("Retry-After"))
            if wait_s is None:
                return response
            await asyncio.sleep(wait_s)

    async def _send_once(self, call: _Call, timeout_s: float) -> httpx.Response:
        try:
            return await self._http.request(**call, timeout=timeout_s)
        except httpx.RequestError as error:
            raise _unreachable(self._http.base_url, error) from error


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


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _predict_call(image: Image, query: _Query) -> _Call:
    call: _Call = {"method": "POST", "url": "/predict", "params": query}
    if isinstance(image, bytes):
        return call | {"content": image, "headers": {"Content-Type": _BINARY}}
    return call | {"files": [_file(image, 0)]}


def _batch_call(images: Sequence[Image], query: _Query) -> _Call:
    files = [_file(image, index) for index, image in enumerate(images)]
    return {"method": "POST", "url": "/predict/batch", "params": query, "files": files}


def _query(top_k: int | None, unknown: Unknown | None, threshold: float | None) -> _Query:
    values = {"top_k": top_k, "unknown": unknown, "threshold": threshold}
    return {name: value for name, value in values.items() if value is not None}


def _file(image: Image, index: int) -> tuple[str, tuple[str, bytes, str]]:
    """Part of a multipart form; bytes are named by their index in the request."""
    if isinstance(image, bytes):
        return "file", (str(index), image, _BINARY)
    path = Path(image)
    return "file", (path.name.encode(errors="replace").decode(), path.read_bytes(), _BINARY)  # a name on disk need not be text


def _body_of(response: httpx.Response, kind: type[_Body]) -> _Body:
    """Read the answer; raise ServiceProblem for a refusal and UnexpectedAnswer for what is neither."""
    if response.status_code != 200:
        raise _problem_of(response)
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise UnexpectedAnswer(
            f"what answers at {response.url} is not this service, or another version of it: {_shown(response)}"
        ) from error


def _health_of(response: httpx.Response) -> Health:
    if response.status_code == 503:
        try:
            return Health.model_validate_json(response.content)
        except ValidationError:
            pass  # a load balancer says that there is no service
    return _body_of(response, Health)


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


def _unreachable(url: httpx.URL, error: httpx.RequestError) -> ServiceUnreachable:
    why = str(error) or type(error).__name__
    return ServiceUnreachable(f"no answer from {url}: {why}; check that the service runs there")
