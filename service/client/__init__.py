"""The Python client: ``from service.client import Client``. Needs httpx, which the ``client`` extra brings."""

from service.client.client import AsyncClient as AsyncClient
from service.client.client import Client as Client
from service.client.client import ClientError as ClientError
from service.client.client import ServiceProblem as ServiceProblem
from service.client.client import ServiceUnreachable as ServiceUnreachable
from service.client.client import UnexpectedAnswer as UnexpectedAnswer
from service.client.retry import RetryPolicy as RetryPolicy
from service.image_files import Image as Image
