"""Fixtures that several test files share, and the rules for slow tests and tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint, load_checkpoint
from service.model.images import InputSpec, decode_image
from service.settings import DEFAULT_CHECKPOINT

_SLOW_TIMEOUT_S = 900

# A busy machine is no reason to fail: no test asserts how long an example takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time than pyproject.toml does, and skip ``gpu`` tests where torch finds no CUDA device."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(_SLOW_TIMEOUT_S))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def image_paths() -> list[Path]:
    """CIFAR-10 test images as PNG, four of each class, named ``<class>-<number>.png``."""
    return sorted((Path(__file__).parent / "images").glob("*.png"))


@pytest.fixture(scope="session")
def png(image_paths: list[Path]) -> bytes:
    """The first of them, as it is in its file."""
    return image_paths[0].read_bytes()


@pytest.fixture(scope="session")
def sample_images(image_paths: list[Path]) -> NDArray[np.uint8]:
    """The same images decoded: uint8 (40, 3, 32, 32)."""
    return np.stack([decode_image(path.read_bytes(), InputSpec()) for path in image_paths])


@pytest.fixture(scope="session")
def checkpoint_path() -> Path:
    """The checkpoint in the repository."""
    return DEFAULT_CHECKPOINT


@pytest.fixture(scope="session")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    """``checkpoint_path``, loaded."""
    return load_checkpoint(checkpoint_path)


@pytest.fixture(scope="session")
def service(checkpoint_path: Path) -> Iterator[ServiceProcess]:
    """The real service with its default settings, one for all tests that do not change it."""
    with ServiceProcess(checkpoint_path) as running:
        yield running
