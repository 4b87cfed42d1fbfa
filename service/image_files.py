"""The kinds of images that a Python program hands to the client or to ``Classifier``, and their bytes as in a file."""

from __future__ import annotations

import os
import threading
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Image: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | PillowImage | NDArray[np.uint8]"
"""Path of an image file, its bytes, an open file, a Pillow image, or uint8 pixels (H, W), (H, W, 3) RGB or (H, W, 4) RGBA."""

CONVERTED = {".tif": "TIFF", ".tiff": "TIFF", **dict.fromkeys((".pbm", ".pgm", ".pnm", ".ppm"), "PPM")}
"""Lower-case file name endings of images that are read as PNG, with Pillow's names of their formats."""
DEFAULT_MAX_IMAGE_PIXELS = 40_000_000
_CONVERTING = threading.Lock()


def read_image(image: Image) -> tuple[bytes, str | None]:
    """Return ``image`` encoded, and the name of its file, None where it has none; pixels become a PNG.

    Raises OSError for a file that cannot be read, TypeError for another object, ValueError for an array of another shape.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), None
    if isinstance(image, str | os.PathLike):
        return read_file(Path(image)), _name(image)
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
    return _png(image), None


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file, as PNG where the service does not accept its format.

    Raises OSError when the file cannot be read or converted.
    """
    kind = CONVERTED.get(path.suffix.lower())
    if kind is None:
        return path.read_bytes()
    from PIL import Image as pillow
    from PIL import ImageOps

    try:
        # Filters of warnings are the process's, and other threads read too.
        with _CONVERTING, warnings.catch_warnings(action="ignore"), pillow.open(path, formats=[kind]) as image:
            if image.width * image.height > DEFAULT_MAX_IMAGE_PIXELS:
                raise OSError(f"the image has {image.width} x {image.height} pixels; scale it down")
            return _png(ImageOps.exif_transpose(image))
    except (ValueError, SyntaxError, MemoryError) as error:  # Pillow, for what is damaged
        raise OSError(f"the image is damaged: {error}") from error


def _png(image: PillowImage) -> bytes:
    png = BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(
        png, "PNG", compress_level=1
    )
    return png.getvalue()


def _name(path: str | os.PathLike[str]) -> str:
    return Path(path).name.encode(errors="replace").decode()  # a name on disk need not be text
