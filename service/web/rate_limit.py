"""How often each caller may ask: a limit per API key, or per address where no keys are configured.

The ``limits`` package counts in a sliding window of two counters; in memory each worker counts by itself, in Redis or
memcached all of them together.
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial

from service.errors import RateLimited
from service.settings import Settings, SettingsError
from service.web.exchange import Exchange, handle

logger = logging.getLogger(__name__)


class RateLimiter:
    """Counts requests for each caller; see ``open_rate_limiter``."""

    def __init__(self, rate: str, storage: str) -> None:
        from limits import aio, parse_many, strategies
        from limits.storage import storage_from_string

        self._limit, *others = parse_many(rate)
        if others or self._limit.amount < 1:
            raise ValueError("it is several limits, or lets nobody in")
        self._is_reported = False  # that the storage fails
        self._local: strategies.SlidingWindowCounterRateLimiter | None = None
        if storage.startswith("memory:"):
            self._local = strategies.SlidingWindowCounterRateLimiter(storage_from_string(storage))
        else:
            self._remote = aio.strategies.SlidingWindowCounterRateLimiter(storage_from_string(f"async+{storage}"))

    def check(self, exchange: Exchange, caller: str) -> None:
        """Count this request of ``caller`` and release it; raise RateLimited, or refuse it later, when he has asked too often.

        Counting in memory is done on return. A storage that cannot be reached limits nobody: it is there to protect the
        service, not to stop it.
        """
        if self._local is None:
            handle(exchange, partial(self._check_remotely, caller))
        elif self._local.hit(self._limit, caller):
            exchange.release()
        else:
            raise self._too_often(self._local.get_window_stats(self._limit, caller)[0])

    async def _check_remotely(self, caller: str, exchange: Exchange) -> None:
        reset = None
        try:
            if not await self._remote.hit(self._limit, caller):
                reset = (await self._remote.get_window_stats(self._limit, caller))[0]
            self._is_reported = False
        except Exception as error:  # of any storage
            if not self._is_reported:
                logger.error("rate limit not counted until the storage is back: %s", error)
            self._is_reported = True
        if reset is not None:
            raise self._too_often(reset)
        exchange.release()

    def _too_often(self, reset: float) -> RateLimited:
        wait_s = max(1, math.ceil(reset - time.time()))
        error = RateLimited(f"more than {self._limit} for one caller; retry after the time given", retry_after_s=wait_s)
        limit = self._limit
        error.headers = (  # draft-ietf-httpapi-ratelimit-headers-10
            (b"ratelimit", b'"default";r=0;t=%d' % wait_s),
            (b"ratelimit-policy", b'"default";q=%d;w=%d' % (limit.amount, limit.get_expiry())),
        )
        return error


def open_rate_limiter(settings: Settings) -> RateLimiter | None:
    """Make the limiter of ``settings``, None where there is no limit; raise SettingsError when it cannot be used."""
    if not settings.rate_limit:
        return None
    try:
        return RateLimiter(settings.rate_limit, settings.rate_limit_storage)
    except ModuleNotFoundError:
        raise SettingsError("rate_limit needs the package 'limits'; install the extra 'rate-limit'") from None
    except Exception as error:  # the package and its storages fail in ways of their own
        raise SettingsError(
            f"cannot use rate_limit {settings.rate_limit!r} with {settings.rate_limit_storage!r}: {error};"
            " write it like '100/second' or '5000/hour'"
        ) from error
