"""Plain JPEG files: the pixels and the refusals that Pillow gives, whatever the file, and Pillow for all that is not plain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import ImageTooLarge, ServiceError
from service.model.images import EncodedImage, InputSpec, decode_image
from service.model.jpeg import decode_plain, plain_size
from tests.support.image_file import encoded
from tests.support.mutation import mutations

FAST_COUNT = 3_000
SLOW_COUNT = 100_000

# Every way of a plain file to be written: what an encoder can be told about codes, sampling, restarts and order.
SAVED: dict[str, dict[str, Any]] = {
    "as Pillow does by default": {},
    "4:4:4": {"subsampling": "4:4:4", "quality": 95},
    "4:2:2": {"subsampling": "4:2:2", "quality": 90},
    "4:2:0": {"subsampling": "4:2:0", "quality": 90},
    "coarse, with 0xff in its tables": {"quality": 5},
    "exact": {"quality": 100, "subsampling": "4:4:4"},
    "with codes of its own": {"optimize": True},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": "4:4:4"},
    "with restarts": {"restart_marker_blocks": 1},
    "progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
    "with a comment": {"comment": b"made by hand"},
}
EXIF_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def by_pillow(plain: bytes) -> bytes:
    """The same file with an empty application segment in front, which says nothing and makes it no plain one."""
    return plain[:2] + b"\xff\xef\0\2" + plain[2:]


def pictures(image_paths: list[Path], size: int) -> Iterator[Image.Image]:
    """A few of the sample images in ``size``, and noise, on which every step of decoding leaves its trace."""
    for path in image_paths[::4]:
        with Image.open(path) as image:
            yield image.convert("RGB").resize((size, size))
    yield Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8))


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED.keys())
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [1, 7, 16, 31, 32, 33, 224])
def test_plain_files_have_the_pixels_that_pillow_gives(
    image_paths: list[Path], size: int, mode: str, options: dict[str, Any]
) -> None:
    """Bit for bit, of every way to write a file, in grey and in colour, of odd sizes too, from bytes and from a view."""
    spec = InputSpec(size=size)
    for picture in pictures(image_paths, size):
        data = encoded(picture.convert(mode), "JPEG", **options)
        assert plain_size(data) == (size, size)
        assert decode_plain(data) is not None
        expected = decode_image(by_pillow(data), spec)
        for result in (decode_image(data, spec), decode_image(memoryview(b"--" + data)[2:], spec)):
            np.testing.assert_array_equal(result, expected)
            assert result.dtype == np.uint8
            assert result.flags.c_contiguous


def test_the_reference_is_pillow_s() -> None:
    """What the other tests compare with does not take the way that they test."""
    assert plain_size(by_pillow(encoded(Image.new("RGB", (32, 32)), "JPEG"))) is None


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("size", [(33, 32), (32, 200), (640, 480)])
def test_plain_files_of_another_size_are_left_to_pillow(size: tuple[int, int], fit: Any) -> None:
    """Scaling is Pillow's, from the reduced scale at which it decodes on."""
    spec = InputSpec(fit=fit)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    assert plain_size(data) == size
    assert EncodedImage(data).pixels == size[0] * size[1]
    np.testing.assert_array_equal(decode_image(data, spec), decode_image(by_pillow(data), spec))


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"exif": EXIF_TURNED}),
        ("RGB", "JPEG", {"xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"}),
        ("RGB", "JPEG", {"icc_profile": bytes(200)}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (32, 32))]}),
        ("RGB", "PNG", {}),
        ("RGB", "WebP", {}),
    ],
)
def test_files_with_more_than_pixels_are_not_plain(mode: str, kind: str, options: dict[str, Any]) -> None:
    """Metadata that may turn a picture, other colours, more than one picture, other formats: all Pillow's."""
    assert plain_size(encoded(Image.new("RGB", (32, 32), (200, 100, 50)).convert(mode), kind, **options)) is None


@pytest.mark.parametrize("marker", [0x01, 0xC3, 0xC9, 0xCC, 0xD8, 0xDC, 0xE0, 0xE1, 0xEE, 0xFF])
def test_an_unexpected_segment_makes_a_file_not_plain(marker: int) -> None:
    """Only tables and comments may stand before the pixels: no lossless or arithmetic code, no second head."""
    data = encoded(Image.new("RGB", (32, 32)), "JPEG")
    assert plain_size(data[:20] + bytes((0xFF, marker, 0, 2)) + data[20:]) is None


def test_a_header_that_is_cut_short_is_not_plain() -> None:
    """Wherever it ends, and Pillow then refuses it."""
    data = encoded(Image.new("RGB", (32, 32)), "JPEG")
    for end in range(data.index(b"\xff\xda")):
        assert plain_size(data[:end]) is None


def test_the_pixel_limit_is_checked_before_decoding() -> None:
    """A plain file with too many pixels is refused by its header as any other."""
    data = encoded(Image.new("RGB", (32, 32)), "JPEG")
    assert EncodedImage(data, max_pixels=1024).pixels == 1024
    with pytest.raises(ImageTooLarge, match="32 x 32 = 1,024 pixels and the limit is 1,023"):
        EncodedImage(data, max_pixels=1023)


@pytest.fixture(scope="module")
def seeds(image_paths: list[Path]) -> list[bytes]:
    """Plain files of every way to be written, of the input's size and of another one."""
    return [
        encoded(picture.convert(mode), "JPEG", **options)
        for size in (32, 40)
        for picture in pictures(image_paths[:1], size)
        for mode in ("RGB", "L")
        for options in SAVED.values()
    ]


def test_mutants_are_decoded_and_refused_as_by_pillow(seeds: list[bytes]) -> None:
    """A few thousand of them."""
    compare_mutants(seeds, FAST_COUNT, seed=3)


@pytest.mark.slow
def test_very_many_mutants_are_decoded_and_refused_as_by_pillow(seeds: list[bytes]) -> None:
    """The same with others, and many more."""
    compare_mutants(seeds, SLOW_COUNT, seed=4)


def compare_mutants(seeds: list[bytes], count: int, seed: int) -> None:
    """Require of every mutant that still seems plain what Pillow makes of it: the same pixels or the same error."""
    outcomes: Counter[str] = Counter()
    for data in mutations(seeds, count, seed):
        if plain_size(data) is None:
            continue
        result, expected = outcome(data), outcome(by_pillow(data))
        np.testing.assert_equal(result, expected)
        if plain_size(data) == (32, 32):
            outcomes["doubted" if decode_plain(data) is None else "taken"] += 1
        outcomes["refused"] += isinstance(result, tuple)
    assert min(outcomes[name] for name in ("taken", "doubted", "refused")) > count // 50, outcomes


def outcome(data: bytes, max_pixels: int = 1_000_000) -> NDArray[np.uint8] | tuple[str, str]:
    """The pixels of ``data``, or the code and the words of the error."""
    try:
        return decode_image(data, InputSpec(), max_pixels=max_pixels)
    except ServiceError as error:
        return error.code, error.detail
