"""Mutated images: an array or a refusal in words, whatever the bytes, and no memory kept of any of them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from service.errors import ImageTooLarge, InvalidImage, UnsupportedMediaType
from service.model.images import InputSpec, decode_image
from tests.support.mutation import mutations
from tests.support.resident_memory import resident_bytes
from tests.support.seed_images import seed_images

FAST_COUNT = 4_000
SLOW_COUNT = 100_000
SPEC = InputSpec()
MAX_PIXELS = 1_000_000  # so that a mutant that claims to be large costs a refusal, not a second
MAX_GROWTH_BYTES = 64 * 2**20  # a few of the largest images, and what the decoders keep to themselves
WARM_UP = 1_000


@pytest.fixture(scope="module")
def seeds(image_paths: list[Path]) -> list[bytes]:
    return seed_images(image_paths)


def test_the_seeds_are_sound(seeds: list[bytes]) -> None:
    """What is mutated are images that decode, so that a mutant's damage is the mutation's."""
    for data in seeds:
        assert decode_image(data, SPEC).shape == (3, SPEC.size, SPEC.size)


def test_mutants_decode_or_are_refused(seeds: list[bytes]) -> None:
    """A few thousand of them."""
    decode_mutants(seeds, FAST_COUNT, seed=1)


@pytest.mark.slow
def test_very_many_mutants_decode_or_are_refused(seeds: list[bytes]) -> None:
    """The same with others, and many more."""
    decode_mutants(seeds, SLOW_COUNT, seed=2)


def decode_mutants(seeds: list[bytes], count: int, seed: int) -> None:
    """Decode ``count`` mutants; require an array or a typed error of each, both to occur, and memory to stay."""
    outcomes: Counter[str] = Counter()
    before = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as errors they would end decoding where a service goes on
        for index, data in enumerate(mutations(seeds, count, seed)):
            if index == WARM_UP:
                before = resident_bytes(os.getpid())
            try:
                image = decode_image(data, SPEC, max_pixels=MAX_PIXELS)
            except (InvalidImage, UnsupportedMediaType, ImageTooLarge) as error:
                outcomes[error.code] += 1
                continue
            outcomes["decoded"] += 1
            assert image.dtype == np.uint8
            assert image.shape == (3, SPEC.size, SPEC.size)
            assert image.flags.c_contiguous
    assert outcomes.total() == count
    assert {"decoded", "invalid_image", "image_too_large"} <= set(outcomes), "the mutants are all of one kind"
    assert resident_bytes(os.getpid()) - before < MAX_GROWTH_BYTES


def test_damaged_metadata_leaves_nothing_behind() -> None:
    """However many files say something new in damaged metadata, no line is written and nothing is remembered of them."""
    script = """
import io
from PIL import Image, TiffImagePlugin
from service.model.images import InputSpec, decode_image

for count in range(1, 100):
    exif = b"Exif\\0\\0MM\\0*\\0\\0\\0\\x08" + count.to_bytes(2, "big") + bytes(count)  # fewer entries than it says
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG", exif=exif)
    decode_image(file.getvalue(), InputSpec())
print(len(set(getattr(TiffImagePlugin, "__warningregistry__", ())) - {"version"}))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert int(done.stdout) == 0
