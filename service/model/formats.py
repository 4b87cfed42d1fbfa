"""Which image formats are accepted, what a file is by its first bytes, and of how many segments it may be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec

from PIL import features

from service.errors import InvalidImage, UnsupportedMediaType
from service.image_files import CONVERTED

_HAS_AVIF = bool(features.check("avif"))
_HAS_HEIC = find_spec("pillow_heif") is not None
FORMATS = ("JPEG", "PNG", "WebP", *(["AVIF"] if _HAS_AVIF else []), *(["HEIC"] if _HAS_HEIC else []), "GIF", "BMP")
"""Accepted formats: AVIF where Pillow was built with it, HEIC with the extra ``heif``."""
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp"}).union(
    {".avif"} if _HAS_AVIF else (), {".heic", ".heif", ".hif"} if _HAS_HEIC else (), CONVERTED
)
"""Lower-case file name endings by which folders are searched for images: of ``FORMATS``, and of what is converted to PNG."""
_ACCEPTED = f"send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
HEAD_BYTES = 4096  # tell what a file is; an SVG may begin with a long comment
# Segments, chunks, blocks or boxes of a file. A PNG of 16 MiB has 2,048 chunks as libpng writes them.
MAX_SEGMENTS = 10_000

_ACCEPTED_BY_HEAD = ("PNG", "WEBP", "GIF", "BMP")
# A file's format by how it begins, as regular expressions.
_HEADS = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PSD": rb"8BPS",
    "ICO": rb"\0\0\x01\0",
    "CUR": rb"\0\0\x02\0",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG XR": rb"II\xbc\x01",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS",
    "QOI": rb"qoif",
    "ICNS": rb"icns",
    "BPG": rb"BPG\xfb",
    "MNG": rb"\x8aMNG",
    "JNG": rb"\x8bJNG",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "XPM": rb"/\* XPM",
    "farbfeld": rb"farbfeld",
    "FITS": rb"SIMPLE  =",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "HDR": rb"#\?RADIANCE",
    "XCF": rb"gimp xcf",
    "camera raw": rb"FUJIFILMCCD-RAW|IIU\0",
    "DDS": rb"DDS ",
    "Netpbm": rb"P[1-7]\n",
    "video": rb"\x1a\x45\xdf\xa3|\0\0\x01\xba|FLV\x01|OggS|RIFF....AVI ",  # Matroska and WebM, MPEG, FLV, Ogg, AVI
    "ZIP archive": rb"PK\x03\x04",
    "gzip archive": rb"\x1f\x8b",
}
_STARTS = {name: re.compile(head, re.DOTALL) for name, head in _HEADS.items()}
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_OTHER_HEIF_BRANDS = {b"mif1", b"mif2", b"mif3", b"msf1", b"avci", b"jpeg", b"j2ki", b"vvic"}


def format_of(data: bytes | memoryview) -> str:
    """Return Pillow's name of the format of ``data``.

    Raises InvalidImage for what is empty or unknown, and UnsupportedMediaType, which names the format, for others.
    """
    if not len(data):
        raise InvalidImage("the image is empty; send the file's bytes")
    if data[:3] == b"\xff\xd8\xff":  # by far the most
        return "JPEG"
    head = bytes(data[:HEAD_BYTES])
    foreign = next((name for name, start in _STARTS.items() if start.match(head)), None)
    if foreign in _ACCEPTED_BY_HEAD:
        return foreign
    if head[4:8] == b"ftyp":
        foreign = _iso_format(head)
        if (foreign == "AVIF" and _HAS_AVIF) or (foreign == "HEIC" and _HAS_HEIC):
            return "HEIF" if foreign == "HEIC" else "AVIF"
    elif foreign is None and _is_svg(head):
        foreign = "SVG"
    if foreign is None:
        raise InvalidImage(f"this is not an image of a known format; {_ACCEPTED}")
    raise UnsupportedMediaType(f"{foreign} files are not supported; {_ACCEPTED}")


def segments() -> Iterator[int]:
    """Count the segments of a file as it is iterated; raise InvalidImage after ``MAX_SEGMENTS``."""
    yield from range(MAX_SEGMENTS)
    raise too_many_segments()


def too_many_segments() -> InvalidImage:
    """Make the error for a file of more than ``MAX_SEGMENTS``."""
    return InvalidImage("the image would cost too much to decode: it has too many segments; save it again without metadata")


def _iso_format(head: bytes) -> str:
    """Tell the relatives of MP4 apart by their brands (ISO/IEC 14496-12, 4.3): the first decides, then the compatible ones."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if brands[0] == b"crx ":
        return "camera raw"
    for brand in brands:
        if brand in _AVIF_BRANDS:
            return "AVIF"
        if brand in _HEIC_BRANDS:
            return "HEIC"
    return "HEIF" if brands[0] in _OTHER_HEIF_BRANDS else "video"


def _is_svg(head: bytes) -> bool:
    """Whether a text begins as XML or SVG, after a byte order mark and blanks; UTF-16 counts as well."""
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").lower()
    return text.startswith((b"<svg", b"<?xml")) or (text.startswith((b"<!--", b"<!doctype")) and b"<svg" in text)
