"""Classifies files, by a running service or by the model in this process; a bad file is an outcome like any other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from service.answers import Options
from service.engine.interface import ModelInfo, Prediction
from service.errors import ServiceError
from service.model.checkpoint import load_checkpoint
from service.model.images import decode_image
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from service.schemas import Answer
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


class FileClassifier(Protocol):
    """Classifies files; ``class_names`` are in the order of the network's outputs."""

    class_names: tuple[str, ...]

    def classify(self, paths: Sequence[Path], options: Options) -> Iterator[FileOutcome]:
        """Yield an outcome for each path, in order, as soon as it is known."""
        ...

    def close(self) -> None:
        """Free connections or memory."""
        ...


class RemoteFileClassifier:
    """Asks a running service, a few files at a time, so that it can batch them."""

    def __init__(self, client: Client) -> None:
        """Request the class names; closes the client and raises ClientError when that fails."""
        self._client = client
        try:
            self.class_names = tuple(client.labels().labels)
        except BaseException:
            client.close()
            raise

    def classify(self, paths: Sequence[Path], options: Options) -> Iterator[FileOutcome]:
        """See ``FileClassifier``."""
        waiting = iter(paths)
        threads = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="predict")
        try:
            # A second file for each connection is ready when the first is done; a list of all would hold every outcome.
            jobs = deque(threads.submit(self._ask, path, options) for path in islice(waiting, 2 * _CONNECTIONS))
            while jobs:
                outcome = jobs.popleft().result()
                jobs.extend(threads.submit(self._ask, path, options) for path in islice(waiting, 1))
                yield outcome
        finally:  # when the caller has had enough, what has not begun never does
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """See ``FileClassifier``."""
        self._client.close()

    def _ask(self, path: Path, options: Options) -> FileOutcome:
        from service.client.client import ClientError, ServiceProblem

        try:
            return FileOutcome(path, self._client.predict(path, **asdict(options)))
        except OSError as error:
            return _unreadable(path, error)
        except ServiceProblem as error:
            return FileOutcome(path, None, error.code, error.detail)
        except ClientError as error:
            return FileOutcome(path, None, "no_answer", str(error))


class LocalFileClassifier:
    """Runs the model in this process, as the service with the same ``settings`` would; nothing listens anywhere."""

    def __init__(self, settings: Settings, files: int) -> None:
        """Load the model for about ``files`` files; raise CheckpointError or RunnerError."""
        self._checkpoint = load_checkpoint(settings.checkpoint)
        # Each batch size is warmed up, so no larger ones than these files need.
        size = max(1, min(files, _BATCH_IMAGES, settings.max_batch_size))
        options = RunnerOptions(settings.runtime, settings.device, settings.precision, settings.cpu_threads, 1, size)
        self._runner = open_runner(self._checkpoint, options)
        self._batch_size = size
        self._max_image_pixels = settings.max_image_pixels
        metadata, threshold = self._checkpoint.metadata, settings.unknown_threshold
        self._model = ModelInfo(
            metadata.name,
            self._checkpoint.version,
            metadata.class_names,
            metadata.input,
            None if self._checkpoint.typicality is None else metadata.unknown_threshold if threshold is None else threshold,
        )
        self.class_names = metadata.class_names

    def classify(self, paths: Sequence[Path], options: Options) -> Iterator[FileOutcome]:
        """See ``FileClassifier``."""
        for start in range(0, len(paths), self._batch_size):
            yield from self._classify_batch(paths[start : start + self._batch_size], options)

    def close(self) -> None:
        """See ``FileClassifier``."""
        self._runner.close()

    def _classify_batch(self, paths: Sequence[Path], options: Options) -> list[FileOutcome]:
        decoded: list[NDArray[np.uint8] | FileOutcome] = []
        for path in paths:
            try:
                decoded.append(decode_image(path.read_bytes(), self._model.input, max_pixels=self._max_image_pixels))
            except OSError as error:
                decoded.append(_unreadable(path, error))
            except ServiceError as error:
                decoded.append(FileOutcome(path, None, error.code, error.detail))
        images = [image for image in decoded if not isinstance(image, FileOutcome)]
        classes = len(self.class_names)
        outputs = self._runner.run(np.stack(images)) if images else np.empty((0, classes + 1), np.float32)
        typicality = None if self._model.unknown_threshold is None else outputs[:, classes]
        prediction = Prediction(outputs[:, :classes], self._model, 0.0, 0.0, len(images), typicality)
        row = count()
        return [
            it
            if isinstance(it, FileOutcome)
            else FileOutcome(path, Answer.model_validate(prediction.answer(next(row), options, path.name)))
            for path, it in zip(paths, decoded, strict=True)
        ]


def _unreadable(path: Path, error: OSError) -> FileOutcome:
    return FileOutcome(path, None, "unreadable_file", f"the file cannot be read: {error.strerror or error}")
