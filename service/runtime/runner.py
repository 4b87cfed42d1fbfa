"""The device: one loaded model behind ``run(images) -> probabilities``, whatever runs it.

``open_runner.py`` chooses the runtime; only the module of that one is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.settings import Settings

# On two cores of a CPU 2,851 images/s at 8, 3,403 at 16, 3,487 at 20, 3,651 at 32, 3,787 at 64: a batch that is cut to the size
# below loses little, and one that is padded to the size above too.
_BUCKETS: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256)
_BUCKETS += (384, 512, 768, 1024, 1536, 2048, 3072, 4096)


class RunnerError(Exception):
    """A model that cannot be loaded or does not answer as it must; the message says why and what to do."""


@dataclass(frozen=True)
class RunnerOptions:
    """What a caller may choose; ``auto`` and 0 choose by the machine and the checkpoint.

    ``threads`` are the processor threads of the model in all, divided among the ``streams`` that run concurrently.
    """

    runtime: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    streams: int = 0
    max_batch_size: int = 64

    @classmethod
    def of(cls, settings: Settings) -> RunnerOptions:
        """Return what the settings say."""
        chosen = settings.runtime, settings.device, settings.precision, settings.cpu_threads, settings.streams
        return cls(*chosen, settings.max_batch_size)


class Runner(ABC):
    """One resident model. ``run`` may be called from a thread for each of its ``streams``, with the stream's number.

    ``buckets`` are the batch sizes that are prepared, ascending. From ``efficient_batch`` on a batch takes time in proportion
    to its bucket. ``lone``: the last stream uses the cores of all others, so that nothing may run concurrently with it.
    """

    def __init__(self, options: RunnerOptions, device: str, runtime: str, efficient_batch: int, *, lone: bool = False) -> None:
        """Run as many streams as ``options`` say, and one more if ``lone``."""
        self.device, self.runtime, self.lone = device, runtime, lone
        self.streams = options.streams + lone
        self.buckets = buckets_up_to(options.max_batch_size)
        self.efficient_batch = min(efficient_batch, options.max_batch_size)

    @abstractmethod
    def run(self, images: NDArray[np.uint8], stream: int = 0) -> NDArray[np.float32]:
        """Map uint8 (N, 3, size, size), RGB, to calibrated probabilities, float32 (N, num_classes).

        A checkpoint with a typicality has it as one more column, the last.

        N is 1 to ``buckets[-1]``; a batch is padded to the next bucket and the padding is cut off the result. The array
        that is returned belongs to the caller. Raises whatever the device raises.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the device's memory."""


class PolledRunner(Runner):
    """A runner whose device works by itself: beginning a batch and polling it take microseconds."""

    @abstractmethod
    def begin(self, parts: Sequence[NDArray[np.uint8]], stream: int) -> None:
        """Begin a batch of arrays uint8 (n, 3, size, size), ``buckets[-1]`` images in all at most; one at a time a stream."""

    @abstractmethod
    def look(self, stream: int) -> NDArray[np.float32] | None:
        """Return what ``run`` would for the batch that was begun, or None while it runs. Raises whatever the device raises."""


def buckets_up_to(max_batch_size: int) -> tuple[int, ...]:
    """Return the batch sizes that are prepared, ascending; the last is ``max_batch_size`` itself."""
    return (*(size for size in _BUCKETS if size < max_batch_size), max_batch_size)
