"""Who may ask for predictions: API keys, from a setting or a file.

Keys are kept as SHA-256 digests, so a dump of the process shows none, and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from pathlib import Path

from service.errors import Unauthorized
from service.observability.request_record import Scope
from service.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

_RELOAD_CHECK_S = 1.0


def check_keys(settings: Settings) -> None:
    """Raise SettingsError when the API keys cannot be read."""
    ApiKeys(settings.api_keys.get_secret_value(), settings.api_keys_file)


class ApiKeys:
    """The keys that are accepted; a file is read again when it changes, one key a line, ``#`` begins a comment."""

    def __init__(self, keys: str = "", file: Path | None = None) -> None:
        """Take comma-separated ``keys`` and those in ``file``; raise SettingsError when the file cannot be read or is empty."""
        self._fixed = frozenset(_digest(key.strip().encode()) for key in keys.split(",") if key.strip())
        self._file = file
        self._modified_ns = -1
        self._checked = 0.0
        self._digests = self._fixed
        if file is not None:
            self._digests = self._fixed | _read(file)
            self._modified_ns = file.stat().st_mtime_ns
            self._checked = time.monotonic()

    @property
    def required(self) -> bool:
        """Whether any key is configured."""
        return bool(self._digests) or self._file is not None

    def allow(self, scope: Scope) -> bool:
        """Whether the request carries an accepted key, as ``Authorization: Bearer`` or ``X-API-Key``."""
        self._reload()
        sent = scope.header(b"x-api-key")
        if sent is None:
            scheme, _, token = (scope.header(b"authorization") or b"").partition(b" ")
            sent = token.strip() if scheme.lower() == b"bearer" else b""
        digest = _digest(sent)
        # Every key is compared: the time taken says neither whether nor which one matched.
        return bool(sent) and sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _reload(self) -> None:
        """Check the file once a second; one that cannot be read any more leaves the keys as they are."""
        if self._file is None or time.monotonic() - self._checked < _RELOAD_CHECK_S:
            return
        self._checked = time.monotonic()
        try:
            modified_ns = self._file.stat().st_mtime_ns
            if modified_ns == self._modified_ns:
                return
            self._digests = self._fixed | _read(self._file)
            self._modified_ns = modified_ns
            logger.info("api keys reloaded keys=%d", len(self._digests))
        except (OSError, SettingsError) as error:
            logger.error("api keys not reloaded, the old ones stay: %s", error)


def check_key(keys: ApiKeys, scope: Scope) -> None:
    """Raise Unauthorized where keys are configured and the request carries none of them."""
    if keys.required and not keys.allow(scope):
        raise Unauthorized("send an API key that is configured here, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def _read(file: Path) -> frozenset[bytes]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the API keys from {file}: {error}") from error
    keys = [line.partition("#")[0].strip() for line in lines]
    digests = frozenset(_digest(key.encode()) for key in keys if key)
    if not digests:
        raise SettingsError(f"{file} holds no API key; write one a line")
    return digests


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
