"""Walks through image files: size, orientation, and the bytes that a decoder needs, within a bounded number of steps.

Everything else (Exif, XMP, profiles, comments, text, later frames) is dropped before a decoder sees the file: none of it
changes pixels here, and decoders spend unbounded time on it. No pixel is decoded and nothing is decompressed.
"""

from __future__ import annotations

import re
from struct import Struct, error, pack, unpack_from
from zlib import crc32

from service.model.formats import MAX_SEGMENTS, segments, too_many_segments
from service.model.heif import largest_size, split

# AVIF and HEIC: decoders search their lists of items once for each item. A photo of 200 megapixels needs about 40,000.
MAX_META_BYTES = 262_144

ORIENTATION_TAG = 0x0112  # Exif 2.32
_MAX_EXIF_ENTRIES = 1_000

_SEGMENT = Struct(">HH")  # JPEG: marker, length
_FRAME = Struct(">BHHB")  # bits a component, height, width, components
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_MAX_JUNK_BYTES = 65_536  # in one file: a search takes 10 ns for each
# Markers (ITU-T T.81, table B.1). C0 to CF but for two of these are frame headers.
_TABLES = frozenset((0xFFC4, 0xFFCC, 0xFFDB, 0xFFDD))
_JFIF_HEAD = b"\xff\xd8\xff\xe0\0\x10JFIF\0"  # without a thumbnail (ITU-T T.871, clause 10.1)
_STANDALONE = (0xFF01, *range(0xFFD0, 0xFFD9))

_COMPRESSED_BMP = (1, 2)  # BI_RLE8, BI_RLE4


class Container:
    """What a walk has found; ``width`` is 0 until the header was read, and what is missing stays at its default."""

    width = 0
    height = 0
    orientation = 0  # by the first Exif; 0 without one
    components = 3  # JPEG: 1 is grey, 3 colour, 4 CMYK
    is_single_scan = False  # JPEG, Huffman-coded, 8 bits: decoded as it is read
    is_lossless = False  # JPEG: without a transform
    coefficient_bytes = 0  # JPEG of several scans: held whole, at two bytes for each sample
    is_run_length = False  # BMP
    junk_bytes = 0  # JPEG: between segments

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data
        self.parts: list[bytes | memoryview] = []  # for the decoder, in order; none: the file as it is

    def payload(self) -> bytes | memoryview:
        """Bytes for the decoder."""
        return b"".join(self.parts) if self.parts else self.data


def walk(kind: str, data: bytes | memoryview) -> tuple[Container, bool]:
    """Walk through a file of ``kind``; also return whether it is complete and sound as far as a walk can see.

    Raises InvalidImage for a file with more than ``MAX_SEGMENTS`` segments.
    """
    container = Container(data)
    try:
        _WALKS[kind](memoryview(data), container)
    except (error, IndexError, StopIteration, ValueError):
        return container, False
    return container, container.width > 0 and container.height > 0


def _orientation(exif: memoryview) -> int:
    """Read the orientation from a TIFF header and its first directory (TIFF 6.0, section 2); 1 if it has none, or 0."""
    if bytes(exif[:6]) == b"Exif\0\0":
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]), "")
    try:
        (at,) = unpack_from(order + "I", exif, 4) if order else (len(exif),)
        (entries,) = unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * min(entries, _MAX_EXIF_ENTRIES), 12):
            tag, of_type = unpack_from(order + "HH", exif, entry)
            if tag == ORIENTATION_TAG:
                return int(unpack_from(order + ("I" if of_type == 4 else "H"), exif, entry + 8)[0]) or 1
    except error:  # damaged metadata does not spoil a sound image
        pass
    return 1


def _walk_jpeg(data: memoryview, found: Container) -> None:
    """Keep tables, the frame header, the first JFIF and Adobe segments, and everything from the first scan on.

    The usual segments come first, which halves the time for a small file.
    """
    at = 20 if data[:11] == _JFIF_HEAD else 2
    kept_from = 0
    frame: bytes | memoryview = b""
    seen = {0xFFE0} if at == 20 else set()
    read_segment = _SEGMENT.unpack_from
    for _ in range(MAX_SEGMENTS):
        marker, length = read_segment(data, at)
        if marker in _TABLES:
            at += 2 + length
            continue
        end = at + 2 + length
        if 0xFFC0 <= marker <= 0xFFCF:
            if found.width:
                raise ValueError  # a second frame header
            bits, found.height, found.width, found.components = _FRAME.unpack_from(data, at + 4)
            found.is_single_scan = marker <= 0xFFC1 and bits == 8
            found.is_lossless = marker == 0xFFC3
            frame = data[at + 10 : end]
        elif marker == 0xFFDA:
            found.is_single_scan &= data[at + 4] == found.components
            if not found.is_single_scan:
                found.coefficient_bytes = _coefficient_bytes(frame, found)
            if kept_from:
                found.parts.append(data[kept_from:])
            return
        else:
            end, keep = _other_segment(data, at, found, seen)
            if not keep:
                found.parts.append(data[kept_from:at])
                kept_from = end
        at = end
    raise too_many_segments()


def _coefficient_bytes(frame: bytes | memoryview, found: Container) -> int:
    """Return the size of the coefficients by the components' sampling factors (ITU-T T.81, B.2.2)."""
    factors = [(byte >> 4, byte & 15) for byte in frame[1 : 3 * found.components : 3]]
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    if not across or not down:
        raise ValueError
    blocks = -(-found.width // (8 * across)) * -(-found.height // (8 * down)) * sum(h * v for h, v in factors)
    return 128 * blocks


def _other_segment(data: memoryview, at: int, found: Container, seen: set[int]) -> tuple[int, bool]:
    """Return where an application segment, a comment or what is no segment at all ends, and whether decoders need it."""
    marker, length = _SEGMENT.unpack_from(data, at)
    if not 0xFF00 < marker < 0xFFFF:  # stray or fill bytes, which decoders skip
        match = _MARKER.search(data, at, at + _MAX_JUNK_BYTES - found.junk_bytes)
        if match is None:
            raise ValueError
        found.junk_bytes += match.start() - at
        return match.start(), False
    end = at + 2 if marker in _STANDALONE else at + 2 + length
    if end > len(data) or marker == 0xFFD9:
        raise ValueError
    name = bytes(data[at + 4 : at + 10])
    if marker == 0xFFE1 and name == b"Exif\0\0":
        found.orientation = found.orientation or _orientation(data[at + 10 : end])
    elif ((marker == 0xFFE0 and name[:5] == b"JFIF\0") or (marker == 0xFFEE and name[:5] == b"Adobe")) and marker not in seen:
        seen.add(marker)
        return end, True
    return end, False


def _walk_png(data: memoryview, found: Container) -> None:
    """Keep the header, the palette, transparency and the pixels; require the end (PNG, third edition, section 5)."""
    at, kind = 8, b""
    depth = colour = 0
    found.parts.append(data[:8])
    for _ in segments():
        length, kind = unpack_from(">I4s", data, at)
        end = at + 12 + length
        body = data[at + 8 : end - 4]
        if kind == b"IHDR" and not found.width:
            found.width, found.height, depth, colour = unpack_from(">IIBB", body)
        if end > len(data) or not found.width:
            raise ValueError
        chunk = data[at:end]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            found.parts.append(chunk)
        elif kind == b"tRNS" and crc32(chunk[4:-4]) == unpack_from(">I", chunk, 8 + length)[0]:
            found.parts.append(_transparency(bytes(body), depth, colour))
        elif kind == b"eXIf":
            found.orientation = found.orientation or _orientation(body)
        if kind == b"IEND":
            return
        at = end


def _transparency(value: bytes, depth: int, colour: int) -> bytes:
    """Make a tRNS chunk in the units of the pixels as Pillow hands them out; nothing of one that is damaged.

    Pillow scales grey of 2 and 4 bits to 8 and cuts colour of 16 bits to 8, but leaves the transparent value as it was.
    """
    if (colour == 0 and len(value) != 2) or (colour == 2 and len(value) != 6) or colour not in (0, 2, 3) or len(value) > 256:
        return b""
    if colour == 0 and depth in (2, 4):
        value = pack(">H", unpack_from(">H", value)[0] * (85 if depth == 2 else 17))
    elif colour == 2 and depth == 16:
        value = bytes((0, value[0], 0, value[2], 0, value[4]))
    chunk = b"tRNS" + value
    return pack(">I", len(value)) + chunk + pack(">I", crc32(chunk))


def _walk_webp(data: memoryview, found: Container) -> None:
    """Keep the picture, or the first frame of an animation, and its canvas (RFC 9649, section 2)."""
    riff_end = 8 + unpack_from("<I", data, 4)[0]
    at, has_frame = 12, False
    kept: list[bytes | memoryview] = []
    for _ in segments():
        kind, length = unpack_from("<4sI", data, at)
        end = at + 8 + length + (length & 1)
        if at == 12:
            found.width, found.height = _webp_size(kind, data[at + 8 :])
        if end > len(data):
            raise ValueError
        if kind == b"VP8X":  # no ICC, Exif and XMP any more: flags 0x20, 0x08 and 0x04
            kept.append(bytes(data[at : at + 8]) + bytes((data[at + 8] & ~0x2C,)) + bytes(data[at + 9 : end]))
        elif kind == b"EXIF":
            found.orientation = found.orientation or _orientation(data[at + 8 : end])
        elif kind in (b"ALPH", b"ANIM") or (kind in (b"VP8 ", b"VP8L", b"ANMF") and not has_frame):
            kept.append(data[at:end])
            has_frame |= kind in (b"VP8 ", b"VP8L", b"ANMF")
        at = end
        if at + 8 > min(riff_end, len(data)):
            break
    if not has_frame or riff_end > len(data) + 1:
        raise ValueError
    found.parts = [b"RIFF", pack("<I", 4 + sum(map(len, kept))), b"WEBP", *kept]


def _webp_size(kind: bytes, body: memoryview) -> tuple[int, int]:
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        (bits,) = unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _walk_gif(data: memoryview, found: Container) -> None:
    """Keep the screen, the last graphic control before the first image, and everything from that image on (GIF89a)."""
    width, height, flags = unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    screen, control = data[:at], data[:0]
    steps = segments()
    while data[at] == 0x21:
        start, label = at, data[at + 1]
        at += 2
        while length := data[at]:
            at += 1 + length
            next(steps)
        at += 1
        if label == 0xF9:
            control = data[start:at]
        next(steps)
    if data[at] != 0x2C:
        raise ValueError
    left, top, frame_width, frame_height = unpack_from("<HHHH", data, at + 1)
    found.width, found.height = max(width, left + frame_width), max(height, top + frame_height)
    found.parts = [screen, control, data[at:]]


def _walk_bmp(data: memoryview, found: Container) -> None:
    """Read the size only: its header has a fixed length."""
    if unpack_from("<I", data, 14)[0] == 12:
        found.width, found.height = unpack_from("<HH", data, 18)
        return
    found.width, height, _, _, compression = unpack_from("<IiHHI", data, 18)
    found.height, found.is_run_length = abs(height), compression in _COMPRESSED_BMP


def _walk_iso(data: memoryview, found: Container) -> None:
    """Read the largest picture's size; hide items of Exif and XMP.

    Orientation is a property too, not that of Exif, and is left to the decoder.
    """
    count = segments()
    top = split(data, count, is_file=True)
    data = data[: top[-1][2]]
    body, end = next((body, end) for kind, body, end in top if kind == b"meta")
    if len(body) > MAX_META_BYTES:
        raise too_many_segments()
    hidden = bytes(body).replace(b"Exif", b"skip").replace(b"mime", b"skip")
    found.width, found.height = largest_size(data, memoryview(hidden), count)
    found.parts = [data[: end - len(body)], hidden, data[end:]]


_WALKS = {
    "JPEG": _walk_jpeg,
    "PNG": _walk_png,
    "WEBP": _walk_webp,
    "GIF": _walk_gif,
    "BMP": _walk_bmp,
    "AVIF": _walk_iso,
    "HEIF": _walk_iso,
}
