"""Classifies files, by a running service or by the model in this process; a bad file is an outcome like any other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from service.answers import Options
from service.image_files import read_file
from service.predict.classifier import Classifier
from service.schemas import Answer, FailedEntry
from service.settings import Settings

if TYPE_CHECKING:
    from service.client.client import Client

_CONNECTIONS = 8
_BATCH_IMAGES = 32


@dataclass(frozen=True)
class FileOutcome:
    """Result of one file: its ``answer``, or the error's ``code`` and ``detail``."""

    path: Path
    answer: Answer | None
    code: str = ""
    detail: str = ""


Predict = Callable[[Sequence[Path], Options], list[FileOutcome]]


@dataclass(frozen=True)
class FileClassifier:
    """Classifies files with ``predict``, ``batch`` at a time in each of so many ``threads``.

    ``class_names`` are in the order of the network's outputs; ``close`` frees connections or memory.
    """

    predict: Predict
    batch: int
    threads: int
    class_names: Sequence[str]
    close: Callable[[], None]

    def classify(self, paths: Sequence[Path], options: Options) -> Iterator[FileOutcome]:
        """Yield an outcome for each path, in order, as soon as it is known."""
        waiting = (paths[start : start + self.batch] for start in range(0, len(paths), self.batch))
        threads = ThreadPoolExecutor(self.threads, thread_name_prefix="predict")
        try:
            # A second job for each thread is ready when the first is done; a list of all would hold every outcome.
            jobs = deque(threads.submit(self.predict, some, options) for some in islice(waiting, 2 * self.threads))
            while jobs:
                outcomes = jobs.popleft().result()
                jobs.extend(threads.submit(self.predict, some, options) for some in islice(waiting, 1))
                yield from outcomes
        finally:  # when the caller has had enough, what has not begun never does
            threads.shutdown(cancel_futures=True)


def by_service(client: Client) -> FileClassifier:
    """Ask a running service, a few files at a time, so that it can batch them.

    Requests the class names; closes the client and raises ClientError when that fails.
    """
    from service.client.client import ClientError, ServiceProblem

    def predict(paths: Sequence[Path], options: Options) -> list[FileOutcome]:
        (path,) = paths
        try:
            return [FileOutcome(path, client.predict(path, **asdict(options)))]
        except OSError as error:
            return [_unreadable(path, error)]
        except ServiceProblem as error:
            return [FileOutcome(path, None, error.code, error.detail)]
        except ClientError as error:
            return [FileOutcome(path, None, "no_answer", str(error))]

    try:
        return FileClassifier(predict, 1, _CONNECTIONS, client.labels().labels, client.close)
    except BaseException:
        client.close()
        raise


def by_model(settings: Settings, files: int) -> FileClassifier:
    """Load the model into this process, for about ``files`` files; raise CheckpointError or RunnerError."""
    batch = max(1, min(files, _BATCH_IMAGES))
    classifier = Classifier(batch_size=batch, settings=settings)

    def predict(paths: Sequence[Path], options: Options) -> list[FileOutcome]:
        files = [(path, _read(path)) for path in paths]
        images = [data for _, data in files if isinstance(data, bytes)]
        entries = iter(classifier.predict_batch(images, **asdict(options)))
        return [data if isinstance(data, FileOutcome) else _outcome(path, next(entries)) for path, data in files]

    return FileClassifier(predict, batch, 1, classifier.class_names, classifier.close)


def _read(path: Path) -> bytes | FileOutcome:
    try:
        return read_file(path)
    except OSError as error:
        return _unreadable(path, error)


def _outcome(path: Path, entry: Answer | FailedEntry) -> FileOutcome:
    if isinstance(entry, FailedEntry):
        return FileOutcome(path, None, entry.error.code, entry.error.detail)
    return FileOutcome(path, entry)


def _unreadable(path: Path, error: OSError) -> FileOutcome:
    return FileOutcome(path, None, "unreadable_file", f"the file cannot be read: {error.strerror or error}")
