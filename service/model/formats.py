"""Which image formats are accepted, what a file is by its first bytes, and of how many segments it may be."""

from __future__ import annotations

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

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
_FOREIGN = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"\0\0\2\0": "CUR",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"II\xbc\1": "JPEG XR",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"qoif": "QOI",
    b"icns": "ICNS",
    b"BPG\xfb": "BPG",
    b"\x8aMNG": "MNG",
    b"\x8bJNG": "JNG",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"/* XPM": "XPM",
    b"farbfeld": "farbfeld",
    b"SIMPLE  =": "FITS",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "HDR",
    b"gimp xcf": "XCF",
    b"FUJIFILMCCD-RAW": "camera raw",
    b"IIU\0": "camera raw",
    b"DDS ": "DDS",
    **{b"P%d\n" % number: "Netpbm" for number in range(1, 8)},
    b"\x1a\x45\xdf\xa3": "video",  # Matroska, WebM
    b"\0\0\1\xba": "video",  # MPEG
    b"FLV\1": "video",
    b"OggS": "video",
    b"PK\3\4": "ZIP archive",
    b"\x1f\x8b": "gzip archive",
}
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
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        foreign = _iso_format(head)
        if (foreign == "AVIF" and _HAS_AVIF) or (foreign == "HEIC" and _HAS_HEIC):
            return "HEIF" if foreign == "HEIC" else "AVIF"
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        foreign = "video"
    elif foreign is None and _is_svg(head):
        foreign = "SVG"
    if foreign is None:
        raise InvalidImage(f"this is not an image of a known format; {_ACCEPTED}")
    raise UnsupportedMediaType(f"{foreign} files are not supported; {_ACCEPTED}")


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
