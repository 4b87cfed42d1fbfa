"""Encoded image bytes to the uint8 array the network takes, by an ``InputSpec``; every bad image a typed error.

Training and serving decode with this one function, so a file gives the identical array in both.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from io import BytesIO
from struct import unpack_from
from typing import Literal
from zlib import crc32

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageOps

from service.errors import ImageTooLarge, InvalidImage, MemoryBudgetExceeded, ServiceError, deadline_passed
from service.image_files import DEFAULT_MAX_IMAGE_PIXELS
from service.model.containers import ORIENTATION_TAG, walk
from service.model.formats import HEAD_BYTES, format_of

# The limit is this module's own, checked against the header before decoding; Pillow's would warn or raise on its own terms.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of damaged metadata, with the file's own numbers: a line on standard error and an entry in a registry that
# only grows, for each file that says something new.
warnings.filterwarnings("ignore", module=r"PIL\.")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # an image decodes in the thread that asks, as with every other format

# Up to here a decode takes 0.3 ms, or 1.3 ms for a JPEG of one scan: the event loop can spare that, and a thread costs more.
QUICK_BYTES = 16_384
QUICK_PIXELS = 65_536  # of a JPEG: at the scale it is decoded at
QUICK_JPEG_BYTES = 131_072
QUICK_JPEG_PIXELS = 1_048_576  # in the file
MAX_SCANS = 100  # of a JPEG; encoders write 10, libvips allows as many. Each goes over all of the pixels.
MAX_SCANNED_PIXELS = 2_600_000_000  # of a JPEG: pixels times scans, 13 of 200 megapixels
MAX_RUN_LENGTH_BYTES = 1_048_576  # of a BMP: Pillow decodes these in Python, 1 to 2 us for each run of two bytes
# Before it is resampled, an image is reduced to 1/2, 1/4 or 1/8, but not below this many times the input: as much as 640x480
# at a quarter. A JPEG is decoded at that scale; libjpeg-turbo's small inverse transforms are means of 2x2, 4x4 or 8x8 pixels,
# and so every other format is reduced by such means. Pixels still differ by a level here and there, as rounding does it.
_MARGIN = 3.75
# Pillow reads this much between two checks of the deadline; a scan can be shorter than the larger.
_READ_BYTES, _SCAN_READ_BYTES = 16_384, 512
# Memory that decoding takes for each pixel, in bytes. Measured: at most 14 for PNG, 19 for WebP, 11 for
# AVIF, 13 for HEIC, 10 for GIF, at 6 megapixels.
_BYTES_PER_PIXEL = {"JPEG": 12, "PNG": 14, "WEBP": 20, "AVIF": 20, "HEIF": 20, "GIF": 12, "BMP": 12}
_SLOW = 64  # formats whose pixels take so many times as long as those of others
_PIXEL_COST = {"AVIF": _SLOW, "HEIF": _SLOW}
# Their libraries decode in one piece, which nothing can end. At least, by 12 megapixels: 30 ns on a core at 2.5 GHz.
_IN_ONE_PIECE = ("WEBP", "AVIF", "HEIF")
_ONE_PIECE_S_PER_PIXEL = 2e-8
_DAMAGED = "the image is damaged or cut short; send the complete file"


@dataclass(frozen=True)
class InputSpec:
    """What the network takes: ``size`` x ``size`` pixels, RGB, normalised as ``(pixel / 255 - mean) / std``.

    ``fit`` says how another shape becomes a square: ``crop`` scales the shorter side and keeps the centre, ``squash``
    scales both sides apart.
    """

    size: int = 32
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616)
    fit: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        """Raise ValueError for a spec that no image can meet."""
        if self.size < 1 or self.fit not in ("crop", "squash"):
            raise ValueError(f"an input spec needs a size of at least 1 and fit 'crop' or 'squash', not {self}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("an input spec needs three means and three standard deviations above 0")


class EncodedImage:
    """One encoded image whose header has been read and whose pixels have not, so that a caller can choose where to decode."""

    def __init__(self, data: bytes | memoryview, spec: InputSpec, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> None:
        """Read the header of ``data`` in at most some milliseconds, whatever its bytes.

        Raises InvalidImage (empty, of no known format, or with too many segments) and UnsupportedMediaType.
        """
        self._spec = spec
        self._max_pixels = max_pixels
        self._kind = kind = format_of(data[:HEAD_BYTES])
        self._file, self._is_sound = file, _ = walk(kind, data)
        scale = _scale(file.width, file.height, spec) if kind == "JPEG" and not file.is_lossless else 1
        self._width, self._height = -(-file.width // scale), -(-file.height // scale)  # as decoded
        self._pixels = self._width * self._height

    def is_quick(self) -> bool:
        """Whether ``decode`` takes about a millisecond at most, which is less than a thread costs."""
        file_bytes, pixels = len(self._file.data), self._file.width * self._file.height
        if self._file.is_single_scan:
            return file_bytes <= QUICK_JPEG_BYTES and pixels <= QUICK_JPEG_PIXELS and self._pixels <= QUICK_PIXELS
        return file_bytes <= QUICK_BYTES and pixels <= QUICK_PIXELS and pixels * self._cost() <= QUICK_PIXELS

    def memory_bytes(self) -> int:
        """Return how much memory ``decode`` will take, at most; raise ImageTooLarge and InvalidImage by the header."""
        file, pixels = self._file, self._pixels
        if pixels > self._max_pixels:
            whole = file.width * file.height
            scaled = "" if pixels == whole else f" ({pixels:,} at the scale it is decoded at)"
            raise ImageTooLarge(
                f"the image has {file.width} x {file.height} = {whole:,} pixels{scaled} and the limit is"
                f" {self._max_pixels:,}; scale it down"
            )
        if not self._is_sound:
            raise InvalidImage(_DAMAGED)
        return pixels * _BYTES_PER_PIXEL[self._kind] + file.coefficient_bytes + len(file.data)

    def decode(self, deadline: float = math.inf) -> NDArray[np.uint8]:
        """Decode to uint8 (3, size, size), RGB, 0..255, C-contiguous, before ``deadline`` (``time.monotonic()``, seconds).

        Raises ImageTooLarge (more than ``max_pixels`` to decode), InvalidImage (damaged, or too costly to decode),
        DeadlineExceeded and MemoryBudgetExceeded (there is not enough memory now).
        """
        self.memory_bytes()
        file = self._file
        try:
            # In one piece, which nothing ends: not for the largest.
            if file.is_single_scan and file.components in (1, 3) and file.width * file.height <= DEFAULT_MAX_IMAGE_PIXELS:
                pixels = self._decode_single_scan(file.payload())
                if pixels is not None:
                    return pixels
            chunks = [part for part in file.parts if part[4:8] == b"IDAT"] if self._kind == "PNG" else []
            if any(crc32(chunk[4:-4]) != unpack_from(">I", chunk, len(chunk) - 4)[0] for chunk in chunks):
                raise InvalidImage(_DAMAGED)  # Pillow shows what a damaged stream happens to unpack to
            return self._decode_by_pillow(deadline)
        except ServiceError:
            raise
        except MemoryError:
            raise MemoryBudgetExceeded("too little memory is left for this image; retry shortly", retry_after_s=1) from None
        except Exception as error:  # decoders fail on hostile bytes in every way there is: OSError, SyntaxError, IndexError
            raise InvalidImage(_DAMAGED) from error

    def _cost(self) -> int:
        """Return how often decoding goes over the pixels, in units of a plain format."""
        if self._kind != "JPEG":
            return _SLOW if self._file.is_run_length else _PIXEL_COST.get(self._kind, 1)
        return 1 if self._file.is_single_scan else bytes(self._file.payload()).count(b"\xff\xda")

    def _decode_single_scan(self, data: bytes | memoryview) -> NDArray[np.uint8] | None:
        """Decode by libjpeg-turbo, with no image object around it; None where it has any doubt, which leaves it to Pillow.

        The pixels are the same. It takes a fifth of Pillow's time for 32x32 pixels, 0.9 for photographs.
        """
        size, orientation = self._spec.size, self._file.orientation
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=self._height, min_width=self._width)
        except ValueError:
            return None
        if self._width == self._height == size and orientation <= 1:
            return np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return _to_array(Image.fromarray(pixels), self._spec, orientation, (self._file.width, self._file.height))

    def _decode_by_pillow(self, deadline: float) -> NDArray[np.uint8]:
        file = self._file
        cost = self._cost()
        is_costly = cost > MAX_SCANS or (self._kind == "JPEG" and cost * file.width * file.height > MAX_SCANNED_PIXELS)
        if is_costly or (file.is_run_length and len(file.data) > MAX_RUN_LENGTH_BYTES):
            raise InvalidImage(
                "the image would cost too much to decode; save it again, not progressive and not run-length coded"
            )
        if self._kind in _IN_ONE_PIECE and deadline - time.monotonic() < self._pixels * _ONE_PIECE_S_PER_PIXEL:
            raise deadline_passed()
        if self._kind == "HEIF":
            _register_heif()
        with Image.open(_TimedFile(file.payload(), deadline), formats=(self._kind,)) as image:
            if image.width * image.height > file.width * file.height:
                raise InvalidImage(_DAMAGED)  # not what the header said
            image.decodermaxblock = _SCAN_READ_BYTES if file.coefficient_bytes else _READ_BYTES
            size = image.size
            if self._width < self._file.width:
                image.draft("RGB", (_least_side(self._spec),) * 2)  # at the same scale as _scale
            image.load()
            orientation = file.orientation
            if self._kind in ("AVIF", "HEIF"):
                orientation = image.getexif().get(ORIENTATION_TAG, 1)
            return _to_array(image, self._spec, orientation, size)


def decode_image(data: bytes | memoryview, spec: InputSpec, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> NDArray[np.uint8]:
    """Decode one encoded image to uint8 (3, size, size), RGB, 0..255, C-contiguous.

    Grey, palette, CMYK, 16-bit and transparent (on white) images are converted, EXIF orientation is applied, and of an
    animation the first frame is taken. An RGB image of the right size comes out bit-exact. Raises what ``EncodedImage``
    and its ``decode`` raise.
    """
    return EncodedImage(data, spec, max_pixels=max_pixels).decode()


class _TimedFile(BytesIO):
    """A file that can be read until ``deadline``: this ends a decoder in the middle of its work."""

    def __init__(self, data: bytes | memoryview, deadline: float) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        if time.monotonic() >= self._deadline:
            raise deadline_passed()
        return super().read(size)


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return uint8 (3, H, W), RGB, as a PNG file, which decodes to the same pixels."""
    png = BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(png, "PNG")
    return png.getvalue()


def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)


def _least_side(spec: InputSpec) -> int:
    return int(_MARGIN * spec.size)


def _scale(width: int, height: int, spec: InputSpec) -> int:
    times = min(width, height) // _least_side(spec)
    return 8 if times >= 8 else 4 if times >= 4 else 2 if times >= 2 else 1


def _to_array(image: Image.Image, spec: InputSpec, orientation: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert an image of ``size``, which a JPEG no longer has where it was reduced in decoding."""
    target = (spec.size, spec.size)
    image = _to_resizable_mode(image)
    if image.size != target:
        scale = _scale(*size, spec)
        if image.size == size and scale > 1:
            image = image.reduce(scale)
        if orientation > 4:  # resizing rounds one axis before the other: swap them first, and leave a flip
            image, size, orientation = image.transpose(Image.Transpose.TRANSPOSE), size[::-1], orientation - 4
        # The last row and column may stand for pixels that are not there.
        image = image.resize(target, Image.Resampling.BILINEAR, box=_box((size[0] / scale, size[1] / scale), spec))
    if orientation > 1:  # a centred square commutes with what is left: turn the small one
        image.getexif()[ORIENTATION_TAG] = orientation
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _to_resizable_mode(image: Image.Image) -> Image.Image:
    """Bring any mode to RGB, RGBA or L, which resample without artefacts."""
    if image.mode in ("RGB", "L") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
        deep = np.asarray(image)
        grey = Image.fromarray((deep >> 8).astype(np.uint8))
        if isinstance(clear := image.info.get("transparency"), int):
            grey.putalpha(Image.fromarray((deep != clear) * np.uint8(255)))
            return grey.convert("RGBA")
        return grey
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("RGB")


def _box(size: tuple[float, float], spec: InputSpec) -> tuple[float, float, float, float]:
    width, height = size
    if spec.fit == "squash":
        return (0, 0, width, height)
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)
