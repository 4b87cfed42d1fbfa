"""The kinds of images that a Python program hands to the client or to ``Classifier``, and their bytes as in a file."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Image: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | PillowImage | NDArray[np.uint8]"
"""Path of an image file, its bytes, an open file, a Pillow image, or uint8 pixels (H, W), (H, W, 3) RGB or (H, W, 4) RGBA."""


def read_image(image: Image) -> tuple[bytes, str | None]:
    """Return ``image`` encoded, and the name of its file, None where it has none; pixels become a PNG.

    Raises OSError for a file that cannot be read, TypeError for another object, ValueError for an array of another shape.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), None
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes(), _name(image)
    if (read := getattr(image, "read", None)) is not None:
        name = getattr(image, "name", None)  # a number for what has no path
        return read(), _name(name) if isinstance(name, str) else None
    from PIL import Image as pillow

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"an array of pixels is uint8 (H, W), (H, W, 3) or (H, W, 4), not {image.dtype} {image.shape}")
        image = pillow.fromarray(image)
    if not isinstance(image, pillow.Image):
        raise TypeError(f"an image is a path, bytes, an open file, a Pillow image or an array, not {type(image).__name__}")
    png = BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(
        png, "PNG", compress_level=1
    )
    return png.getvalue(), None


def _name(path: str | os.PathLike[str]) -> str:
    return Path(path).name.encode(errors="replace").decode()  # a name on disk need not be text
