"""Sound image files of every accepted format, for mutations to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.image_file import encoded

# Every format with every mode it can store, and what a file can carry beside its pixels.
SAVED: list[tuple[str, str, dict[str, Any]]] = [
    *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    ("PNG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGB", {"transparency": (10, 20, 30), "icc_profile": bytes(200)}),
    *[("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")],
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", "subsampling": 0}),
    ("WebP", "RGB", {}),
    ("WebP", "RGBA", {}),
    ("WebP", "RGB", {"lossless": True}),
    *[("GIF", mode, {}) for mode in ("L", "P")],
    ("GIF", "P", {"transparency": 3, "interlace": 1}),
    *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    *[("AVIF", mode, {"speed": 10}) for mode in ("RGB", "RGBA")],
    *[("HEIC", mode, {}) for mode in ("L", "RGB", "RGBA")],
]


def seed_images(samples: Sequence[Path]) -> list[bytes]:
    """Return files of every way to save, of two sizes; animations; a quarter of the ``samples``."""
    files = [path.read_bytes() for path in samples[::4]]
    with Image.open(samples[0]) as sample:
        pictures = [sample.convert("RGB"), sample.convert("RGB").resize((90, 61))]
    for picture in pictures:
        files += [saved(picture, kind, mode, options) for kind, mode, options in SAVED]
        for kind in ("GIF", "WebP", "PNG"):
            files.append(saved(picture, kind, "RGB", {"save_all": True, "append_images": [picture.rotate(90)]}))
    return files


def saved(picture: Image.Image, kind: str, mode: str, options: dict[str, Any]) -> bytes:
    """Return ``picture`` as a file of one of the ways in ``SAVED``."""
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) << 8)
    return encoded(picture.convert(mode), kind, **options)
