"""``GET /health``, ``/health/ready``, ``/health/live`` and ``/labels``.

Owns: which state answers 200 and which 503. Does not know: how the states come about.
"""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import ORJSONResponse
