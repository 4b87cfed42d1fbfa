"""Pictures as the files that clients send."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of ``image`` as a file."""
    out = BytesIO()
    if kind == "HEIC":
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    image.save(out, "HEIF" if kind == "HEIC" else kind, **options)
    return out.getvalue()
