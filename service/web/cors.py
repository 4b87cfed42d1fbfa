"""Which pages' scripts may call the service from a browser (the Fetch standard, "CORS protocol")."""

from __future__ import annotations

from service.errors import MalformedRequest
from service.observability.request_record import Scope
from service.web.exchange import Reply

_MAX_AGE_S = 600


class Cors:
    """Allows every method and header to scripts of ``origins``, comma-separated; ``*`` is any."""

    def __init__(self, origins: str) -> None:
        self._origins = {origin.strip().encode() for origin in origins.split(",") if origin.strip()}
        self._any = b"*" in self._origins
        self._shared = [(b"access-control-expose-headers", b"*")]
        if self._any:
            self._shared.append((b"access-control-allow-origin", b"*"))

    def preflight(self, scope: Scope) -> Reply | None:
        """Return the answer to a browser's question before its request; None where ``scope`` is no such question.

        Raises MalformedRequest for another origin.
        """
        if scope.method != "OPTIONS" or scope.header(b"access-control-request-method") is None:
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

    def allow(self, scope: Scope, reply: Reply) -> None:
        """Add the headers to ``reply`` that let the page which sent ``scope`` read it."""
        if (origin := scope.header(b"origin")) is None:
            return
        if not self._any:
            reply.headers.append((b"vary", b"Origin"))
            if origin not in self._origins:
                return
            reply.headers.append((b"access-control-allow-origin", origin))
        reply.headers += self._shared
