"""Who may ask for predictions: API keys, from a setting or a file.

Keys are kept as SHA-256 digests, so a dump of the process shows none. A request's key is found by its digest: how long that
takes says nothing of the keys.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from pathlib import Path

from service.errors import Unauthorized
from service.model.atomic_file import read_whole
from service.observability.request_record import Scope
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

_RELOAD_CHECK_S = 1.0
_COMMENT = re.compile(r"(?:^|\s)#.*")


def open_keys(settings: Settings) -> ApiKeys:
    """Return the keys of the settings; raise SettingsError when their file cannot be read or holds none."""
    file = settings.api_keys_file
    try:
        if file is not None and not _digests(read_whole(file)):
            raise SettingsError(f"{file} holds no API key; write one a line")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the API keys from {file}: {error}") from error
    return ApiKeys(settings.api_keys.get_secret_value(), file)


class ApiKeys:
    """The keys that are accepted: comma-separated ``keys``, and those in ``file``, which is read again when it changes.

    The file has one key a line; ``#`` at the beginning of a line or after a space begins a comment. While it cannot be read,
    the keys that were read last stay; an empty file takes all of them away.
    """

    def __init__(self, keys: str = "", file: Path | None = None) -> None:
        self._fixed = frozenset(_digest(key.strip().encode()) for key in keys.split(",") if key.strip())
        self._file = file
        self._failure = ""  # why the file could not be read
        self._next_check = 0.0
        self._digests = self._fixed
        self.required = bool(self._fixed) or file is not None
        """Whether a request must carry a key."""
        self.reload()

    def caller(self, scope: Scope) -> str:
        """Return what stands for the key of the request, sent as ``X-API-Key`` or ``Authorization: Bearer``.

        The other of the two may be there for a proxy. Raises Unauthorized where neither is an accepted one.
        """
        self.reload()
        scheme, _, token = (scope.header(b"authorization") or b"").partition(b" ")
        for sent in (scope.header(b"x-api-key"), token if scheme.lower() == b"bearer" else None):
            if sent is not None and (digest := _digest(sent.strip())) in self._digests:
                return digest.hex()
        raise Unauthorized("send an API key that is configured here, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")

    def reload(self) -> None:
        """Compare the file once a second with what was read last."""
        if self._file is None or (now := time.monotonic()) < self._next_check:
            return
        self._next_check = now + _RELOAD_CHECK_S
        try:
            digests, failure = self._fixed | _digests(read_whole(self._file)), ""
        except (OSError, UnicodeDecodeError) as error:
            digests, failure = self._digests, str(error)
            if failure != self._failure:
                logger.error("api keys not read, the old ones stay: %s", failure)
        if digests != self._digests or (self._failure and not failure):
            logger.info("api keys read keys=%d", len(digests))
        self._digests, self._failure = digests, failure


def _digests(content: bytes) -> frozenset[bytes]:
    keys = [_COMMENT.sub("", line).strip() for line in content.decode("utf-8-sig").splitlines()]
    return frozenset(_digest(key.encode()) for key in keys if key)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
