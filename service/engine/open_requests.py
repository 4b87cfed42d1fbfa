"""The requests that an engine has accepted and not ended yet: each ends exactly once, at its deadline at the latest.

All deadlines share one timer of the event loop. Nearly every deadline is met, so a timer for each request, set and cancelled,
would be most of its cost. The timer goes off at the earliest deadline that was known when it was set, whether or not that
request is still open, and is then set again for the earliest one that is.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import ServiceError, deadline_passed

_ids = itertools.count(1)


class Request:
    """One request. ``images`` is uint8 (n, 3, size, size), ``deadline`` a ``time.monotonic()`` in seconds.

    ``finish`` is called once with the outcome and must not raise. ``id`` fits in 32 bits. ``explain`` is None for a prediction;
    for an explanation of its only image it is the number of a class, or ``LIKELIEST``. ``size`` counts the images that the
    queue holds for it: an explanation has no place there.
    """

    __slots__ = ("deadline", "enqueued", "explain", "finish", "id", "images", "size")

    def __init__(
        self, images: NDArray[np.uint8], deadline: float, finish: Callable[[Any], None], explain: int | None = None
    ) -> None:
        self.id = next(_ids) & 0xFFFFFFFF
        self.images = images
        self.deadline = deadline
        self.finish = finish
        self.explain = explain
        self.size = len(images) if explain is None else 0
        self.enqueued = time.monotonic()


class OpenRequests:
    """Used on one event loop. ``images`` is the sum of the sizes of all open requests.

    ``on_expired`` is called with each request whose deadline has passed, before its ``finish``: the engine removes it from
    wherever it waits.
    """

    def __init__(self, on_expired: Callable[[Request], None]) -> None:
        self.images = 0
        self._on_expired = on_expired
        self._open: dict[int, Request] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def __len__(self) -> int:
        """Return the number of open requests."""
        return len(self._open)

    def __contains__(self, request: Request) -> bool:
        """Whether ``request`` has not ended; may be asked from any thread."""
        return request.id in self._open

    def add(self, request: Request) -> None:
        """Accept ``request``."""
        self._open[request.id] = request
        self.images += request.size
        if request.deadline < self._timer_at:
            self._set_timer(request.deadline)

    def end(self, id_: int, outcome: object) -> None:
        """Call ``finish`` of the request with this ``Request.id``, unless it has ended already."""
        request = self._remove(id_)
        if request is not None:
            request.finish(outcome)

    def end_all(self, error: ServiceError) -> None:
        """End every open request with ``error``."""
        for id_ in list(self._open):
            self.end(id_, error)
        self._set_timer(math.inf)

    def discard(self, request: Request) -> bool:
        """End ``request`` without calling its ``finish``; return whether it was open."""
        return self._remove(request.id) is not None

    def expire(self) -> None:
        """End every request whose deadline has passed. Takes no time while there is none."""
        now = time.monotonic()
        if now < self._timer_at:
            return
        late = [request for request in self._open.values() if request.deadline <= now]
        for request in late:
            self._on_expired(request)
            self.end(request.id, deadline_passed())
        self._set_timer(min((request.deadline for request in self._open.values()), default=math.inf))

    def _remove(self, id_: int) -> Request | None:
        request = self._open.pop(id_, None)
        if request is not None:
            self.images -= request.size
        return request

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, at
        if at < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer_at = 0.0  # the event loop's clock is coarser than the deadlines: it may ring a moment early
        self.expire()
