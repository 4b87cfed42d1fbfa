"""``Classifier``: the model in one's own process, with images of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service import Classifier
from service.errors import InvalidImage, InvalidParameter
from service.image_files import read_image
from service.model.checkpoint import Checkpoint
from service.schemas import Answer, FailedEntry
from tests.support.image_file import noise


@pytest.fixture(scope="module")
def classifier(checkpoint_path: Path) -> Iterator[Classifier]:
    with Classifier(checkpoint_path, batch_size=2) as classifier:
        yield classifier


def kinds(path: Path) -> dict[str, Any]:
    """The same image as everything that is accepted."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return {
        "a path": path,
        "a path as text": str(path),
        "bytes": path.read_bytes(),
        "an open file": BytesIO(path.read_bytes()),
        "a Pillow image": Image.fromarray(pixels),
        "an array": pixels,
        "an array with alpha": np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    }


def test_every_kind_of_image_gets_the_same_answer(
    classifier: Classifier, image_paths: list[Path], checkpoint: Checkpoint
) -> None:
    """Label, scores, typicality and model as over HTTP; a file has its name."""
    path = image_paths[0]
    answers = [classifier.predict(image, top_k=3) for image in kinds(path).values()]
    assert answers[0].label == path.name.split("-")[0]
    assert answers[0].known
    assert answers[0].model.version == checkpoint.version
    assert [answer.filename for answer in answers] == [path.name] * 2 + [None] * 5
    assert all(answer.model_copy(update={"filename": path.name}) == answers[0] for answer in answers)
    with path.open("rb") as file:
        assert classifier.predict(file, top_k=3) == answers[0]


def test_a_batch_has_an_entry_for_each_image_in_order(classifier: Classifier, image_paths: list[Path]) -> None:
    """A bad image among the good ones is an entry with its error, whatever the size of the device's batches."""
    entries = classifier.predict_batch([*image_paths[:3], b"no image", noise()], unknown="reject")
    assert [type(entry) for entry in entries] == [Answer, Answer, Answer, FailedEntry, Answer]
    assert [entry.label for entry in entries[:3] if isinstance(entry, Answer)] == [
        classifier.predict(path).label for path in image_paths[:3]
    ]
    assert isinstance(entries[3], FailedEntry)
    assert entries[3].error.code == "invalid_image"
    assert isinstance(entries[4], Answer)
    assert (entries[4].label, entries[4].known) == (None, False)
    assert classifier.predict_batch([]) == []


def test_what_a_service_would_refuse_is_an_error(classifier: Classifier, tmp_path: Path) -> None:
    """An image or an option; a file that cannot be read is the caller's own error."""
    with pytest.raises(InvalidImage):
        classifier.predict(b"no image")
    with pytest.raises(InvalidParameter, match="between 1 and 10"):
        classifier.predict(noise(), top_k=11)
    with pytest.raises(FileNotFoundError):
        classifier.predict(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (5, TypeError),
        (None, TypeError),
        (np.zeros((32, 32, 3)), ValueError),
        (np.zeros((3, 32, 32), np.uint8), ValueError),
        (np.zeros(32, np.uint8), ValueError),
    ],
)
def test_other_objects_are_no_images(image: Any, error: type[Exception]) -> None:
    """The message says what an image may be."""
    with pytest.raises(error, match=r"an (image|array of pixels) is"):
        read_image(image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "F", "I;16"])
def test_pillow_images_of_every_mode_are_encoded(mode: str) -> None:
    """What PNG has no place for is converted."""
    data, name = read_image(Image.new(mode, (5, 4)))
    with Image.open(BytesIO(data)) as image:
        assert (image.format, image.size, name) == ("PNG", (5, 4), None)
