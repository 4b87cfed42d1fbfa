"""When a client sends a refused request again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_PASSING = (429, 503)  # a full queue; starting, draining or between two engines


@dataclass(frozen=True)
class RetryPolicy:
    """At most ``max_tries`` requests within ``max_total_s``, waits included; ``max_tries=1`` never tries again.

    The service's ``Retry-After`` says how long to wait; without it the waits double from ``first_wait_s``. A wait that would
    not end in time is not begun.
    """

    max_tries: int = 5
    max_total_s: float = 60.0
    first_wait_s: float = 0.5

    def __post_init__(self) -> None:
        """Raise ValueError for a policy that allows no request at all."""
        if self.max_tries < 1 or self.max_total_s <= 0 or self.first_wait_s < 0:
            raise ValueError(f"a retry policy needs at least one try, some time and no negative wait, not {self}")


class Tries:
    """The tries of one request under ``policy``, from now on by ``clock`` (seconds)."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._end = clock() + policy.max_total_s
        self._made = 0

    @property
    def left_s(self) -> float:
        """The time that is left, never quite nothing: a timeout of 0 would fail what is under way."""
        return max(0.001, self._end - self._clock())

    def wait_s(self, status: int, retry_after: str | None) -> float | None:
        """Give the seconds to wait before the next try, None when this answer is the last; count it."""
        self._made += 1
        if status not in _PASSING or self._made >= self._policy.max_tries:
            return None
        told_s = retry_after_s(retry_after)
        wait_s = self._policy.first_wait_s * 2.0 ** (self._made - 1) if told_s is None else told_s
        return wait_s if self._clock() + wait_s < self._end else None


def retry_after_s(header: str | None) -> float | None:
    """Read ``Retry-After``, seconds or a date (RFC 9110, section 10.2.3); None where there is none or it is neither."""
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
