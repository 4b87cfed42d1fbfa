"""How often each caller may ask: a limit per API key, or per address where no keys are configured.

Owns: the limit and who a caller is. Does not know: keys' validity, routes. The counting is the ``limits`` package's (a sliding
window of two counters); in memory each worker counts by itself, in Redis or memcached all of them together.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import time
from typing import TYPE_CHECKING

from starlette.types import Scope

from service.errors import Overloaded
from service.settings import Settings, SettingsError
from service.web.asgi_exchange import header

if TYPE_CHECKING:
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

logger = logging.getLogger(__name__)


class RateLimiter:
    """Counts requests for each caller; see ``open_rate_limiter``."""

    def __init__(self, rate: str, storage: str, *, by_key: bool) -> None:
        from limits import parse
        from limits.aio import strategies
        from limits.storage import storage_from_string

        self._limit = parse(rate)
        self._by_key = by_key
        self._limiter: SlidingWindowCounterRateLimiter = strategies.SlidingWindowCounterRateLimiter(
            storage_from_string(f"async+{storage}")
        )

    async def check(self, scope: Scope) -> None:
        """Count this request; raise Overloaded, with the seconds to wait, when its caller has asked too often.

        A storage that cannot be reached limits nobody: it is there to protect the service, not to stop it.
        """
        caller = self._caller(scope)
        try:
            if await self._limiter.hit(self._limit, caller):
                return
            reset, _ = await self._limiter.get_window_stats(self._limit, caller)
        except Exception:  # of any storage
            logger.exception("rate limit not counted")
            return
        wait_s = max(1, math.ceil(reset - time.time()))
        raise Overloaded(f"more than {self._limit} for one caller; retry after the time given", retry_after_s=wait_s)

    def _caller(self, scope: Scope) -> str:
        key = header(scope, b"x-api-key") or header(scope, b"authorization") if self._by_key else None
        if key is not None:
            return hashlib.sha256(key).hexdigest()
        client = scope.get("client")
        return client[0] if client else "unknown"


def open_rate_limiter(settings: Settings) -> RateLimiter | None:
    """Make the limiter of ``settings``, None where there is no limit; raise SettingsError when it cannot be used."""
    if not settings.rate_limit:
        return None
    if importlib.util.find_spec("limits") is None:
        raise SettingsError("rate_limit needs the package 'limits'; install the extra 'rate-limit'")
    try:
        by_key = bool(settings.api_keys.get_secret_value() or settings.api_keys_file)
        return RateLimiter(settings.rate_limit, settings.rate_limit_storage, by_key=by_key)
    except Exception as error:  # the package and its storages fail in ways of their own
        raise SettingsError(
            f"cannot use rate_limit {settings.rate_limit!r} with {settings.rate_limit_storage!r}: {error};"
            " write it like '100/second' or '5000/hour'"
        ) from error
