"""The id that a request carries through answers and logs: the client's own if it is sane, else one made here.

Owns: what sane means. Does not know: who logs it.
"""

from __future__ import annotations

import re
import secrets

from starlette.types import Scope

_SANE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_KEY = "service.observability.request_id"


def request_id_of(scope: Scope) -> str:
    """Give the request's id, the same one however often it is asked for."""
    known: str | None = scope.get(_KEY)
    if known is not None:
        return known
    made = None
    for key, value in scope["headers"]:
        if key == b"x-request-id" and _SANE.fullmatch(value):
            made = value.decode("ascii")
            break
    scope[_KEY] = made = made or make_request_id()
    return made


def make_request_id() -> str:
    """Make an id for a request that brought none."""
    return secrets.token_hex(16)
