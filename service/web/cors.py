"""Which pages' scripts may call the service from a browser (the Fetch standard, "CORS protocol")."""

from __future__ import annotations

from service.errors import MalformedRequest
from service.observability.request_record import Scope
from service.web.reply import Headers, Reply

_MAX_AGE_S = 600


class Cors:
    """Allows every method and header to scripts of ``origins``, comma-separated; ``*`` is any, nothing is none."""

    def __init__(self, origins: str) -> None:
        self._origins = {origin.strip().encode() for origin in origins.split(",") if origin.strip()}
        self._any = b"*" in self._origins

    def preflight(self, scope: Scope) -> Reply | None:
        """Return the answer to a browser's question before its request; None where ``scope`` is no such question.

        Raises MalformedRequest for another origin.
        """
        if not self._origins or scope.method != "OPTIONS" or scope.header(b"access-control-request-method") is None:
            return None
        if not (self._any or scope.header(b"origin") in self._origins):
            raise MalformedRequest("pages of this origin may not call the service")
        headers = [
            (b"access-control-allow-methods", b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"),
            (b"access-control-max-age", b"%d" % _MAX_AGE_S),
        ]
        if asked := scope.header(b"access-control-request-headers"):
            headers.append((b"access-control-allow-headers", asked))
        return Reply(b"OK", headers, b"text/plain; charset=utf-8")

    def headers(self, scope: Scope) -> Headers:
        """Headers of the answer to ``scope`` that let its page read it."""
        if not self._origins or (origin := scope.header(b"origin")) is None:
            return []
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*")]
        if origin not in self._origins:
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"*"),
            (b"vary", b"Origin"),
        ]
