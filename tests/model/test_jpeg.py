"""JPEG files: the pixels that Pillow gives, whichever decoder took the file."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidImage
from service.model.images import InputSpec, decode_image
from tests.support.image_file import encoded

# What an encoder can choose: codes, sampling, restarts, order, colours, metadata.
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "4:4:4": ("RGB", {"subsampling": "4:4:4", "quality": 95}),
    "4:2:2": ("RGB", {"subsampling": "4:2:2", "quality": 90}),
    "4:2:0": ("RGB", {"subsampling": "4:2:0", "quality": 90}),
    "coarse, with 0xff in its tables": ("RGB", {"quality": 5}),
    "with codes of its own": ("RGB", {"optimize": True}),
    "with restarts": ("RGB", {"restart_marker_blocks": 1}),
    "RGB, not YCbCr": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "progressive": ("RGB", {"progressive": True}),
    "CMYK": ("CMYK", {}),
    "with metadata": ("RGB", {"comment": b"made by hand", "icc_profile": bytes(70_000), "xmp": b"<x:xmpmeta/>"}),
}


def by_pillow(data: bytes, size: int) -> NDArray[np.uint8]:
    """What Pillow alone makes of a file, cropped to its centre."""
    with Image.open(BytesIO(data)) as image:
        width, height = image.size
        image.draft("RGB", (15 * size // 4, 15 * size // 4))
        rgb = image.convert("L" if image.mode == "L" else "RGB")
    if rgb.size != (size, size):
        scale = -(-width // rgb.width)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left / scale, top / scale, (left + side) / scale, (top + side) / scale)
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(rgb.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize(("mode", "options"), SAVED.values(), ids=SAVED.keys())
@pytest.mark.parametrize("size", [(32, 32), (31, 33), (641, 479)])
def test_every_jpeg_has_the_pixels_that_pillow_gives(
    image_paths: list[Path], size: tuple[int, int], mode: str, options: dict[str, Any]
) -> None:
    """Bit for bit, at full and at reduced scale, from bytes and from a view."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    with Image.open(image_paths[0]) as sample:
        pictures = [sample.convert("RGB").resize(size), Image.fromarray(noise)]
    for picture in pictures:
        data = encoded(picture.convert(mode), "JPEG", **options)
        for result in (decode_image(data, InputSpec()), decode_image(memoryview(b"--" + data)[2:], InputSpec())):
            np.testing.assert_array_equal(result, by_pillow(data, 32))
            assert result.flags.c_contiguous


def test_stray_bytes_between_segments_are_passed_over() -> None:
    """Some cameras write fill bytes and junk before a marker."""
    data = encoded(Image.linear_gradient("L").resize((300, 200)), "JPEG")
    spoilt = data[:20] + b"\xff\xff\0junk\xff\0" + data[20:]
    np.testing.assert_array_equal(decode_image(spoilt, InputSpec()), by_pillow(data, 32))


def test_many_runs_of_stray_bytes_count_together() -> None:
    """Each is short, but a file of nothing else keeps the event loop for as long as one long run."""
    data = encoded(Image.linear_gradient("L").resize((300, 200)), "JPEG")
    runs = 20 * (4_096 * b"\xff" + b"\xff\xfe\0\2")
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(data[:20] + runs + data[20:], InputSpec())
    decode_image(data[:20] + runs[: len(runs) // 2] + data[20:], InputSpec())


def test_a_lossless_jpeg_is_decoded_whole() -> None:
    """Scanners write it; it has no transform, and so no smaller one."""
    frame = struct.pack(">BHHB3B", 8, 300, 400, 1, 1, 0x11, 0)
    table = bytes((0, 1, *15 * (0,), 0))  # one code, of one bit: no difference to the pixel before
    segments = [(0xC3, frame), (0xC4, table), (0xDA, bytes((1, 1, 0, 1, 0, 0)))]
    head = b"".join(struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body for marker, body in segments)
    result = decode_image(b"\xff\xd8" + head + bytes(400 * 300 // 8) + b"\xff\xd9", InputSpec())
    np.testing.assert_array_equal(result, np.full((3, 32, 32), 128))
