"""The id that a request carries through responses and logs: the client's own if it is harmless, else one made here."""

from __future__ import annotations

import re
import secrets

_HARMLESS = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_from(sent: bytes | None) -> str:
    """Id of a request whose ``X-Request-ID`` is ``sent``, None where it has none."""
    return sent.decode("ascii") if sent is not None and _HARMLESS.fullmatch(sent) else make_request_id()


def make_request_id() -> str:
    """Make an id for a request that brought none."""
    return secrets.token_hex(16)
