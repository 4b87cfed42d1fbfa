"""Classifies files, by a running service or by the model in this process; a bad file is an outcome like any other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from service.answers import OptionArguments
from service.image_files import read_file
from service.predict.classifier import Classifier
from service.schemas import Answer
from service.settings import Settings

if TYPE_CHECKING:
    from service.client.client import Client

_CONNECTIONS = 8
_BATCH_IMAGES = 32


class CannotBegin(Exception):
    """Nothing was classified; the message says why and what to do."""


@dataclass(frozen=True)
class FileOutcome:
    """Result of one file: its ``answer``, or the error's ``code`` and ``detail``."""

    path: Path
    answer: Answer | None
    code: str = ""
    detail: str = ""


Predict = Callable[[Sequence[bytes], OptionArguments], Sequence[Answer | tuple[str, str]]]
"""Classifies encoded images; each gets an answer, or an error's code and detail."""


@dataclass(frozen=True)
class FileClassifier:
    """Classifies files with ``predict``, ``batch`` at a time in each of so many ``threads``.

    ``class_names`` are in the order of the network's outputs.
    """

    predict: Predict
    batch: int
    threads: int
    class_names: Sequence[str]

    def classify(self, paths: Sequence[Path], options: OptionArguments) -> Iterator[FileOutcome]:
        """Yield an outcome for each path, in order, as soon as it is known."""
        waiting = (paths[start : start + self.batch] for start in range(0, len(paths), self.batch))
        threads = ThreadPoolExecutor(self.threads, thread_name_prefix="predict")
        try:
            # A second job for each thread is ready when the first is done; a list of all would hold every outcome.
            jobs = deque(threads.submit(self._outcomes, some, options) for some in islice(waiting, 2 * self.threads))
            while jobs:
                outcomes = jobs.popleft().result()
                jobs.extend(threads.submit(self._outcomes, some, options) for some in islice(waiting, 1))
                yield from outcomes
        finally:  # when the caller has had enough, what has not begun never does
            threads.shutdown(cancel_futures=True)

    def _outcomes(self, paths: Sequence[Path], options: OptionArguments) -> list[FileOutcome]:
        results: dict[Path, Answer | tuple[str, str]] = {}
        images: dict[Path, bytes] = {}
        for path in paths:
            try:
                images[path] = read_file(path)
            except OSError as error:
                results[path] = "unreadable_file", f"the file cannot be read: {error.strerror or error}"
        results |= zip(images, self.predict(list(images.values()), options), strict=True)
        found = [(path, results[path]) for path in paths]
        return [
            FileOutcome(path, result) if isinstance(result, Answer) else FileOutcome(path, None, *result)
            for path, result in found
        ]


@contextmanager
def by_service(client: Client) -> Iterator[FileClassifier]:
    """Ask a running service, a few files at a time, so that it can batch them; raise CannotBegin when nothing answers."""
    from service.client.client import ClientError, ServiceProblem

    def predict(images: Sequence[bytes], options: OptionArguments) -> list[Answer | tuple[str, str]]:
        try:
            return [client.predict(image, **options) for image in images]
        except ServiceProblem as error:
            return [(error.code, error.detail)]
        except ClientError as error:
            return [("no_answer", str(error))]

    with client:
        try:
            class_names = client.labels().labels
        except ClientError as error:
            raise CannotBegin(str(error)) from error
        yield FileClassifier(predict, 1, _CONNECTIONS, class_names)


@contextmanager
def by_model(settings: Settings, files: int) -> Iterator[FileClassifier]:
    """Load the model into this process, for about ``files`` files; raise CheckpointError or RunnerError."""
    batch = max(1, min(files, _BATCH_IMAGES))

    def predict(images: Sequence[bytes], options: OptionArguments) -> list[Answer | tuple[str, str]]:
        entries = classifier.predict_batch(images, **options)
        return [entry if isinstance(entry, Answer) else (entry.error.code, entry.error.detail) for entry in entries]

    with Classifier(batch_size=batch, settings=settings) as classifier:
        yield FileClassifier(predict, batch, 1, classifier.class_names)
