"""Image files that can be trained on: those that the service accepts, and TIFF and Netpbm, which are converted."""

from __future__ import annotations

import threading
import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from service.errors import ImageTooLarge
from service.model.formats import IMAGE_SUFFIXES
from service.model.images import DEFAULT_MAX_IMAGE_PIXELS

_CONVERTED = {".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM"}
_CONVERTING = threading.Lock()
TRAINING_SUFFIXES = IMAGE_SUFFIXES | _CONVERTED.keys()
"""Lower-case file name endings of images for training."""


def read_image_file(path: Path) -> bytes:
    """Return the file's bytes, as PNG where the service does not accept its format.

    Raises OSError when the file cannot be read or converted, and ImageTooLarge.
    """
    kind = _CONVERTED.get(path.suffix.lower())
    if kind is None:
        return path.read_bytes()
    png = BytesIO()
    try:
        # Filters of warnings are the process's, and other threads read too.
        with _CONVERTING, warnings.catch_warnings(action="ignore"), Image.open(path, formats=[kind]) as image:
            if image.width * image.height > DEFAULT_MAX_IMAGE_PIXELS:
                raise ImageTooLarge(f"the image has {image.width} x {image.height} pixels; scale it down")
            is_png = image.mode in ("1", "L", "P", "RGB", "RGBA", "I;16")
            ImageOps.exif_transpose(image if is_png else image.convert("RGB")).save(png, "PNG", compress_level=1)
    except (ValueError, SyntaxError, MemoryError) as error:  # Pillow, for what is damaged
        raise OSError(f"the image is damaged: {error}") from error
    return png.getvalue()
