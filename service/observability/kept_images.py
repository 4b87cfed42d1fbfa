"""Images that the model is unsure of or does not know, kept for people to sort and to train on."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import re
import threading
from pathlib import Path

from service.answers import DEFAULT_OPTIONS
from service.engine.interface import Prediction
from service.model.atomic_file import WriteError, replacing
from service.model.formats import format_of

logger = logging.getLogger(__name__)

_WAITING = 4  # images; more are not kept, so that memory and answers do not depend on the disk
_CHECKED_AFTER = 0.01  # of the bounds, since to list a folder of thousands of files takes a while
_NAME = re.compile(r"[0-9a-f]{32}\.[a-z]+")


class KeptImages:
    """Files ``folder/<label>/<digest>.<format>``, written by a thread; several processes may share the folder.

    An image is kept if its best score is below ``below`` or it is not known. The oldest files go where there are more than
    ``max_files`` or they have more than ``max_bytes``, which may be exceeded by a hundredth for each process. Names say
    nothing about who sent an image or when.
    """

    def __init__(self, folder: Path, *, below: float, max_files: int, max_bytes: int) -> None:
        self._folder = folder
        self._below = below
        self._max_files, self._max_bytes = max_files, max_bytes
        self._unchecked = 1.0  # share of the bounds that was written since they were last checked, or more
        self._waiting: queue.Queue[tuple[bytes, str] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="kept images", daemon=True)
        self._thread.start()

    def offer(self, data: bytes | memoryview, prediction: Prediction) -> None:
        """Have the image ``data``, whose ``prediction`` is given, kept if it is to be and the thread keeps up; never wait."""
        scores = prediction.probabilities[0]
        best = int(scores.argmax())
        if scores[best] < self._below or prediction.known(0, DEFAULT_OPTIONS) is False:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait((bytes(data), prediction.model.class_names[best]))

    def close(self) -> None:
        """Write what waits, for five seconds at most."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=5)
            self._thread.join(timeout=5)

    def _write_all(self) -> None:
        is_failing = False
        while (waiting := self._waiting.get()) is not None:
            data, label = waiting
            try:
                self._write(data, label)
                is_failing = False
            except (WriteError, OSError) as error:
                if not is_failing:  # once, not for every image on a full disk
                    logger.warning("images are not kept: %s", error)
                is_failing = True

    def _write(self, data: bytes, label: str) -> None:
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{format_of(data).lower()}"
        path = self._folder / re.sub(r"^\.|[/\\\0]", "-", label) / name
        if path.exists():
            return
        with replacing(path) as file:
            file.write(data)
        self._unchecked += 1 / self._max_files + len(data) / self._max_bytes
        if self._unchecked >= _CHECKED_AFTER:
            self._remove_oldest()
            self._unchecked = 0.0

    def _remove_oldest(self) -> None:
        """Keep to the bounds; only files with names as this class gives them count and go."""
        files = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if _NAME.fullmatch(path.name):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        files.sort()
        count, total = len(files), sum(size for _, size, _ in files)
        for _, size, path in files:
            if count <= self._max_files and total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            count, total = count - 1, total - size
