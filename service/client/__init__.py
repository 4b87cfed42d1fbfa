"""The Python client: ``from service.client import Client``. Needs httpx, which the ``client`` extra brings."""

from service.client.client import (
    AsyncClient,
    Client,
    ClientError,
    ServiceProblem,
    ServiceUnreachable,
    UnexpectedAnswer,
)
from service.client.retry import RetryPolicy
from service.image_files import Image

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "Image",
    "RetryPolicy",
    "ServiceProblem",
    "ServiceUnreachable",
    "UnexpectedAnswer",
]
