"""Clients that ask for predictions without pause, and keep count of how every request ended."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_PATIENCE_S = 120.0  # no expectation of speed: only the end of a test that would hang
_PAUSE_S = 0.02  # of a client that was refused: it asks again, but not in a busy loop


class Load:
    """That many ``clients`` posting ``image`` to ``url``/predict, each over a connection kept alive, in the ``with`` block.

    A request ends with a status, or is lost: sent over an open connection and never answered. A connection that is not
    accepted is neither; it is tried again.
    """

    def __init__(self, url: str, image: bytes, clients: int = 4) -> None:
        parts = urlsplit(url)
        self._address = (str(parts.hostname), int(parts.port or 80))
        self._image = image
        self._threads = [threading.Thread(target=self._ask, name=f"client-{index}") for index in range(clients)]
        self._statuses: Counter[int] = Counter()
        self._versions: Counter[str] = Counter()
        self._lost: list[str] = []
        self._stopping = False
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        """Start asking."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Ask no more, and wait for what is on its way."""
        self._stopping = True
        for thread in self._threads:
            thread.join()

    @property
    def statuses(self) -> Counter[int]:
        """How many requests ended with each status so far."""
        with self._news:
            return self._statuses.copy()

    @property
    def versions(self) -> Counter[str]:
        """How many predictions each version of the model has made so far."""
        with self._news:
            return self._versions.copy()

    @property
    def lost(self) -> list[str]:
        """What was seen in place of each answer that never came."""
        with self._news:
            return list(self._lost)

    def wait_until(self, condition: Callable[[Counter[int]], bool]) -> None:
        """Wait until ``condition`` holds of the statuses so far; raise AssertionError after two minutes."""
        with self._news:
            held = self._news.wait_for(lambda: condition(self._statuses), _PATIENCE_S)
            assert held, f"it never came true of {self._statuses}, lost {self._lost}"

    def wait_for_more(self, status: int, count: int) -> None:
        """Wait until ``count`` more requests have ended with ``status``."""
        wanted = self.statuses[status] + count
        self.wait_until(lambda statuses: statuses[status] >= wanted)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE_S)
        headers = {"content-type": "image/png"}
        while not self._stopping:
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:
                time.sleep(_PAUSE_S)
                continue
            try:
                connection.request("POST", "/predict", self._image, headers)
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with self._news:
                    self._lost.append(repr(error))
                    self._news.notify_all()
                continue
            with self._news:
                self._statuses[response.status] += 1
                if response.status == 200:
                    self._versions[json.loads(body)["model"]["version"]] += 1
                self._news.notify_all()
            if response.status != 200:
                time.sleep(_PAUSE_S)
        connection.close()
