"""Classifies files, by a running service or by the model in this process; a bad file is an outcome like any other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from service.answers import OptionArguments
from service.image_files import read_file
from service.predict.classifier import Classifier
from service.schemas import Answer

_CONNECTIONS = 8
_BATCH_IMAGES = 32
_NEEDS_EXTRA = "--url needs httpx, and it is not installed; pip install '.[client]'"


class CannotBegin(Exception):
    """Nothing was classified; the message says why and what to do."""


class Failure(NamedTuple):
    """Why a file has no answer: the error's code, and what it says."""

    code: str
    detail: str


Predict = Callable[[Sequence[bytes], OptionArguments], Sequence[Answer | Failure]]
"""Classifies encoded images; each gets an answer or a failure."""


@dataclass(frozen=True)
class FileClassifier:
    """Classifies files with ``predict``, ``batch`` at a time in each of so many ``threads``.

    ``class_names`` are in the order of the network's outputs.
    """

    predict: Predict
    batch: int
    threads: int
    class_names: Sequence[str]

    def classify(self, paths: Sequence[Path], options: OptionArguments) -> Iterator[tuple[Path, Answer | Failure]]:
        """Yield each path with its answer or failure, in order, as soon as it is known."""
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

    def _outcomes(self, paths: Sequence[Path], options: OptionArguments) -> list[tuple[Path, Answer | Failure]]:
        results: dict[Path, Answer | Failure] = {}
        images: dict[Path, bytes] = {}
        for path in paths:
            try:
                images[path] = read_file(path)
            except OSError as error:
                results[path] = Failure("unreadable_file", f"the file cannot be read: {error.strerror or error}")
        results |= zip(images, self.predict(list(images.values()), options), strict=True)
        return [(path, results[path]) for path in paths]


@contextmanager
def by_service(url: str, api_key: str) -> Iterator[FileClassifier]:
    """Ask a running service, a few files at a time, so that it can batch them; raise CannotBegin when nothing answers."""
    try:
        from service.client.client import Client, ClientError, ServiceProblem
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise CannotBegin(_NEEDS_EXTRA) from error

    def predict(images: Sequence[bytes], options: OptionArguments) -> list[Answer | Failure]:
        try:
            return [client.predict(image, **options) for image in images]
        except ServiceProblem as error:
            return [Failure(error.code, error.detail)]
        except ClientError as error:
            return [Failure("no_answer", str(error))]

    with ExitStack() as stack:
        try:
            client = stack.enter_context(Client(url, api_key=api_key))
            class_names = client.labels().labels
        except (ValueError, ClientError) as error:
            raise CannotBegin(str(error)) from error
        yield FileClassifier(predict, 1, _CONNECTIONS, class_names)


@contextmanager
def by_model(files: int) -> Iterator[FileClassifier]:
    """Load the model into this process, for about ``files`` files; raise as ``Classifier`` does."""
    batch = max(1, min(files, _BATCH_IMAGES))

    def predict(images: Sequence[bytes], options: OptionArguments) -> list[Answer | Failure]:
        entries = classifier.predict_batch(images, **options)
        return [entry if isinstance(entry, Answer) else Failure(entry.error.code, entry.error.detail) for entry in entries]

    with Classifier(batch_size=batch) as classifier:
        yield FileClassifier(predict, batch, 1, classifier.class_names)
