"""Pictures as the files that clients send."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of ``image`` as a file."""
    out = BytesIO()
    if kind == "HEIC":
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    image.save(out, "HEIF" if kind == "HEIC" else kind, **options)
    return out.getvalue()


def noise() -> bytes:
    """A PNG of uniform noise: like no photograph."""
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)))
