"""Encoded image bytes to the uint8 array the network takes, by an ``InputSpec``; every bad image a typed error.

Owns: formats, modes, orientation, limits and geometry. Does not know: batching, the device, torch, HTTP.
Training and serving decode with this one function, so a file gives the identical array in both.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from io import BytesIO
from struct import unpack_from
from typing import Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import ImageTooLarge, InvalidImage, ServiceError, UnsupportedMediaType
from service.model.jpeg import decode_plain, plain_size

# The limit is this module's own, checked against the header before decoding; Pillow's would warn or raise on its own terms.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of damaged metadata, with the file's own numbers: a line on standard error and an entry in a registry that
# only grows, for each file that says something new.
warnings.filterwarnings("ignore", module=r"PIL\.")

DEFAULT_MAX_IMAGE_PIXELS = 40_000_000
# Up to here one decode takes about 0.3 ms, what two hops to a thread of a busy process take.
SMALL_BYTES = 16_384
SMALL_PIXELS = 65_536
FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp"})
"""Lower-case file name endings of ``FORMATS``, by which folders are searched for images."""
_ACCEPTED = f"send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "SVG"),
    (b"qoif", "QOI"),
)

# EXIF orientation -> the transposition that undoes it (Exif 2.32, tag 0x0112).
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_SOURCES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


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
    """One encoded image whose header has been read and whose pixels have not, so that a caller can choose where to decode.

    ``pixels`` is width times height by the header; ``is_small`` says that decoding costs less than a hop to another thread.
    """

    def __init__(self, data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> None:
        """Read the header of ``data``.

        Raises InvalidImage (empty or undecodable), UnsupportedMediaType (a format not in ``FORMATS``) and ImageTooLarge
        (more than ``max_pixels``).
        """
        self._data = data
        self._max_pixels = max_pixels
        self._plain_size = plain_size(data)
        self._image: Image.Image | None = None
        size = self._plain_size
        if size is None or size[0] * size[1] > max_pixels:
            self._image = _open(data, max_pixels)
            size = self._image.size
        self.pixels = size[0] * size[1]
        self.is_small = len(data) <= SMALL_BYTES and self.pixels <= SMALL_PIXELS

    def decode(self, spec: InputSpec) -> NDArray[np.uint8]:
        """Decode to uint8 (3, size, size), RGB, 0..255, C-contiguous, once; raise InvalidImage for damaged data."""
        if self._plain_size == (spec.size, spec.size):
            pixels = decode_plain(self._data)
            if pixels is not None:  # else Pillow says whether it is damaged
                return np.ascontiguousarray(pixels.transpose(2, 0, 1))
        opened = self._image or _open(self._data, self._max_pixels)
        try:
            with opened as image:
                if image.format == "PNG":
                    _check_png(memoryview(self._data))
                return _to_array(image, spec)
        except Exception as error:  # decoders fail on hostile bytes in every way there is: OSError, SyntaxError, IndexError
            raise InvalidImage("the image is damaged or cut short; send the complete file") from error


def decode_image(data: bytes | memoryview, spec: InputSpec, *, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> NDArray[np.uint8]:
    """Decode one encoded image to uint8 (3, size, size), RGB, 0..255, C-contiguous.

    Grey, palette, CMYK, 16-bit and transparent (on white) images are converted, EXIF orientation is applied, and of an
    animation the first frame is taken. An RGB image of the right size comes out bit-exact. Raises what ``EncodedImage``
    raises.
    """
    return EncodedImage(data, max_pixels=max_pixels).decode(spec)


def _open(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    """Read the header only; the format is told by its first bytes, so one decoder is tried and no other."""
    if not len(data):
        raise InvalidImage("the image is empty; send the file's bytes")
    head = bytes(data[:32])
    kind = _sniff(head)
    try:
        if kind == "WEBP":  # its decoder allocates the whole canvas when it opens a file
            _check_pixels(_webp_size(head), max_pixels)
        image = Image.open(BytesIO(data), formats=(kind,))
    except ServiceError:
        raise
    except Exception as error:  # as in decode
        raise InvalidImage(f"the header of this {kind} image is damaged; send the complete file") from error
    try:
        _check_pixels(image.size, max_pixels)
    except ImageTooLarge:
        image.close()
        raise
    return image


def _sniff(head: bytes) -> str:
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            raise UnsupportedMediaType(f"{name} images are not supported; {_ACCEPTED}")
    if head[4:8] == b"ftyp":
        raise UnsupportedMediaType(f"AVIF, HEIC and video files are not supported; {_ACCEPTED}")
    raise InvalidImage(f"this is not an image of a known format; {_ACCEPTED}")


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height:,} pixels and the limit is {max_pixels:,}; scale it down"
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Read the canvas size from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    chunk = head[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _check_png(data: memoryview) -> None:
    """Raise ValueError unless every pixel chunk has its checksum and the file its end (PNG specification, section 5).

    Pillow checks neither: it shows what a cut or damaged stream happens to unpack to.
    """
    position = 8
    while True:
        length, kind = unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError("cut short")
        if kind == b"IDAT" and crc32(data[position + 4 : end - 4]) != unpack_from(">I", data, end - 4)[0]:
            raise ValueError("damaged")
        if kind == b"IEND":
            return
        position = end


def _to_array(image: Image.Image, spec: InputSpec) -> NDArray[np.uint8]:
    target = (spec.size, spec.size)
    if image.format in ("JPEG", "MPO"):
        # Decodes at 1/2, 1/4 or 1/8 scale, but never below twice the target, so that the resampling stays clean.
        image.draft("RGB", (2 * spec.size, 2 * spec.size))
    image.load()
    orientation = _orientation(image)
    image = _to_resizable_mode(image)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR, box=_box(image.size, spec), reducing_gap=2.0)
    if orientation is not None:  # a centred square commutes with every transposition: turn the small one
        image = image.transpose(orientation)
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
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    if not any(source in image.info for source in _ORIENTATION_SOURCES):
        return None
    with contextlib.suppress(Exception):  # damaged metadata does not spoil a sound image
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    return None


def _box(size: tuple[int, int], spec: InputSpec) -> tuple[float, float, float, float]:
    width, height = size
    if spec.fit == "squash":
        return (0, 0, width, height)
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)
