"""Files to answers, by a running service or by the model itself in this process; a bad file is an outcome like any other.

Owns: reading the files, the order of the outcomes. Does not know: where the files come from, how outcomes are shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from service.answers import best_classes, make_answer
from service.engine.model_store import info_of, runner_options
from service.errors import ServiceError
from service.model.checkpoint import load_checkpoint
from service.model.images import decode_image
from service.runtime.open_runner import open_runner
from service.schemas import Answer
from service.settings import Settings

if TYPE_CHECKING:
    from service.client.client import Client

_CONNECTIONS = 8
_BATCH_IMAGES = 32


@dataclass(frozen=True)
class FileOutcome:
    """What became of one file: its ``answer``, or why there is none, in a word and in words."""

    path: Path
    answer: Answer | None
    code: str = ""
    detail: str = ""


class FileClassifier(Protocol):
    """Classifies files; ``class_names`` are in the order of the network's outputs."""

    class_names: tuple[str, ...]

    def classify(self, paths: Sequence[Path], top_k: int) -> Iterator[FileOutcome]:
        """Give an outcome for each path, in order, as soon as there is one; ``top_k`` is 1 to the number of classes."""
        ...

    def close(self) -> None:
        """Give connections or memory back."""
        ...


class RemoteFileClassifier:
    """Asks a running service, a few files at a time, so that it can batch them."""

    def __init__(self, client: Client) -> None:
        """Ask for the class names; raise ClientError when there is no answer. The client is closed with this, or then."""
        self._client = client
        try:
            self.class_names = tuple(client.labels().labels)
        except BaseException:
            client.close()
            raise

    def classify(self, paths: Sequence[Path], top_k: int) -> Iterator[FileOutcome]:
        """See ``FileClassifier``."""
        waiting = iter(paths)
        threads = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="predict")
        try:
            # A second file for each connection is ready when the first is done; a list of all would hold every outcome.
            jobs = deque(threads.submit(self._ask, path, top_k) for path in islice(waiting, 2 * _CONNECTIONS))
            while jobs:
                outcome = jobs.popleft().result()
                jobs.extend(threads.submit(self._ask, path, top_k) for path in islice(waiting, 1))
                yield outcome
        finally:  # when the caller has had enough, what has not begun never does
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """See ``FileClassifier``."""
        self._client.close()

    def _ask(self, path: Path, top_k: int) -> FileOutcome:
        from service.client.client import ClientError, ServiceProblem

        try:
            return FileOutcome(path, self._client.predict(path, top_k=top_k))
        except OSError as error:
            return _unreadable(path, error)
        except ServiceProblem as error:
            return FileOutcome(path, None, error.code, error.detail)
        except ClientError as error:
            return FileOutcome(path, None, "no_answer", str(error))


class LocalFileClassifier:
    """Runs the model in this process, as the service with the same ``settings`` would; nothing listens anywhere."""

    def __init__(self, settings: Settings, count: int) -> None:
        """Load the model for about ``count`` files; raise CheckpointError or RunnerError."""
        checkpoint = load_checkpoint(settings.checkpoint)
        # Each batch size is warmed up, so no larger ones than these files need.
        size = max(1, min(count, _BATCH_IMAGES, settings.max_batch_size))
        self._runner = open_runner(checkpoint, replace(runner_options(settings), streams=1, max_batch_size=size))
        self._batch_size = size
        self._max_image_pixels = settings.max_image_pixels
        self._model = info_of(checkpoint)
        self.class_names = self._model.class_names

    def classify(self, paths: Sequence[Path], top_k: int) -> Iterator[FileOutcome]:
        """See ``FileClassifier``."""
        for start in range(0, len(paths), self._batch_size):
            yield from self._classify_batch(paths[start : start + self._batch_size], top_k)

    def close(self) -> None:
        """See ``FileClassifier``."""
        self._runner.close()

    def _classify_batch(self, paths: Sequence[Path], top_k: int) -> list[FileOutcome]:
        outcomes: list[FileOutcome] = []
        images, places = [], []
        for place, path in enumerate(paths):
            outcome = FileOutcome(path, None)
            try:
                images.append(decode_image(path.read_bytes(), self._model.input, max_pixels=self._max_image_pixels))
                places.append(place)
            except OSError as error:
                outcome = _unreadable(path, error)
            except ServiceError as error:
                outcome = FileOutcome(path, None, error.code, error.detail)
            outcomes.append(outcome)
        if images:
            for place, row in zip(places, self._runner.run(np.stack(images)), strict=True):
                best = best_classes(row, self.class_names, top_k)
                answer = Answer.model_validate(make_answer(best, self._model.name, self._model.version, paths[place].name))
                outcomes[place] = FileOutcome(paths[place], answer)
        return outcomes


def _unreadable(path: Path, error: OSError) -> FileOutcome:
    return FileOutcome(path, None, "unreadable_file", f"the file cannot be read: {error.strerror or error}")
