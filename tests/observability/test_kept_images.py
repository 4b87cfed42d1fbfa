"""Images to sort are kept within bounds, under names that say nothing, and their folder can be trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.servers.service_process import ServiceProcess
from service.engine.interface import ModelInfo, Prediction
from service.model.images import InputSpec
from service.observability.kept_images import KeptImages
from training.data.folder import load_folder

MODEL = ModelInfo("tiny", "0123456789ab", ("cat", "../dog"), InputSpec(), unknown_threshold=0.05)


def predicted(scores: tuple[float, float], typicality: float | None = None) -> Prediction:
    column = None if typicality is None else np.array([typicality], np.float32)
    return Prediction(np.array([scores], np.float32), MODEL, 0.0, 0.0, 1, column)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def images(image_paths: list[Path]) -> Iterator[bytes]:
    """PNG files, each another one."""
    return (path.read_bytes() for path in image_paths)


@pytest.mark.parametrize(
    ("scores", "typicality", "kept"),
    [
        ((0.6, 0.4), None, True),
        ((0.7, 0.3), None, False),
        ((0.99, 0.01), 0.01, True),
        ((0.99, 0.01), 0.5, False),
    ],
)
def test_what_is_unsure_or_unknown_is_kept(
    scores: tuple[float, float], typicality: float | None, kept: bool, images: Iterator[bytes], tmp_path: Path
) -> None:
    """Below the score, or below the model's threshold of typicality; the folder is named by the predicted class."""
    keeping = KeptImages(tmp_path / "kept", below=0.7, max_files=10, max_bytes=10**6)
    image = next(images)
    keeping.offer(memoryview(image), predicted(scores, typicality))
    keeping.close()
    assert [path.read_bytes() for path in files(tmp_path)] == [image] * kept
    assert [path.parent.name for path in files(tmp_path)] == ["cat"] * kept


def test_the_oldest_go_and_what_others_put_there_stays(images: Iterator[bytes], tmp_path: Path) -> None:
    """At most three files, an image that comes again is one of them, and no label leads out of the folder."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "mine.png").write_bytes(b"x")
    sent = [next(images) for _ in range(5)]
    for number, image in enumerate([*sent, sent[-1]]):
        keeping = KeptImages(tmp_path, below=0.7, max_files=3, max_bytes=10**6)
        keeping.offer(image, predicted((0.4, 0.6)))
        keeping.close()
        os.utime(next(path for path in files(tmp_path) if path.read_bytes() == image), (number, number))
    assert {path.read_bytes() for path in files(tmp_path)} == {b"x", *sent[2:]}


def test_bytes_are_bounded_too(images: Iterator[bytes], tmp_path: Path) -> None:
    """Of two images the second stays where there is room for one and a half."""
    first, second = next(images), next(images)
    for image in (first, second):
        keeping = KeptImages(tmp_path, below=1.0, max_files=10, max_bytes=len(second) + len(first) // 2)
        keeping.offer(image, predicted((0.6, 0.4)))
        keeping.close()
        for path in files(tmp_path):
            os.utime(path, (1, 1))
    assert [path.read_bytes() for path in files(tmp_path)] == [second]


def test_a_disk_that_cannot_be_written_is_one_warning(
    images: Iterator[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However many images could not be kept."""
    (tmp_path / "file").write_text("")
    keeping = KeptImages(tmp_path / "file", below=1.0, max_files=10, max_bytes=10**6)
    for _ in range(3):
        keeping.offer(next(images), predicted((0.6, 0.4)))
    keeping.close()
    assert caplog.text.count("images are not kept") == 1


@pytest.mark.slow
def test_a_service_keeps_what_can_be_trained_on(
    checkpoint_path: Path, image_paths: list[Path], sample_images: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Requests with one image are kept as they came, under the class that was answered, and a folder reader takes them."""
    with ServiceProcess(checkpoint_path, keep_folder=tmp_path, keep_below=1.0) as service, httpx.Client(timeout=60) as client:
        for path in image_paths:
            response = client.post(f"{service.url}/predict", content=path.read_bytes(), headers={"content-type": "image/png"})
            assert response.status_code == 200
        assert service.stop() == 0
    kept = files(tmp_path)
    assert {path.read_bytes() for path in kept} <= {path.read_bytes() for path in image_paths}
    assert len(kept) > 10
    names = {path.parent.name for path in kept}
    assert names <= {path.name.split("-")[0] for path in image_paths}
    assert len(load_folder(tmp_path, InputSpec())) == len(kept)
