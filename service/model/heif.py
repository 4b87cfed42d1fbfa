"""Boxes of AVIF and HEIC files (ISO/IEC 14496-12 and 23008-12), and how large the pictures are that a decoder makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from math import prod
from operator import itemgetter
from struct import Struct, unpack_from

from service.errors import InvalidImage

# Segments, chunks, blocks or boxes of a file. A PNG of 16 MiB has 2,048 chunks as libpng writes them.
MAX_SEGMENTS = 10_000
# AV1: all frames by their pixels, in pictures of the largest size. A grid of padded tiles with alpha has up to 8.
_MAX_FRAMES = 16
_MAX_HEADERS = 100  # AV1: different ones; the tiles of a picture have the same
_HEADER_BYTES = 400  # AV1: the size lies within them
_SEQUENCE_HEADER, _FRAMES = 1, (3, 6, 7)  # AV1: kinds of units
_LEB128 = re.compile(rb"[\x80-\xff]{0,7}[\0-\x7f]")
_BOX = Struct(">I4s")


def too_many_segments() -> InvalidImage:
    """Make the error for a file of more than ``MAX_SEGMENTS``."""
    return InvalidImage("the image would cost too much to decode: it has too many segments; save it again without metadata")


def boxes(data: memoryview) -> list[tuple[bytes, memoryview, int]]:
    """Split into boxes, each its type, its body and where it ends (14496-12, 4.2); raise ValueError and struct.error."""
    found: list[tuple[bytes, memoryview, int]] = []
    at = 0
    while at < len(data):
        length, kind = _BOX.unpack_from(data, at)
        head = 8
        if length == 1:
            head, (length,) = 16, unpack_from(">Q", data, at + 8)
        end = at + length if length else len(data)
        if end > len(data) or end < at + head:
            raise ValueError
        found.append((kind, data[at + head : end], end))
        if len(found) > MAX_SEGMENTS:
            raise too_many_segments()
        at = end
    return found


def largest_size(data: memoryview, meta: memoryview) -> tuple[int, int]:
    """Return width and height of the largest picture, by the items' properties and by the headers of AV1 itself.

    A decoder makes what the header says and scales it to what the property says. Of HEVC, libheif refuses what is larger
    than the property. Raises ValueError, IndexError, struct.error, and InvalidImage for more than can be looked at.
    """
    sizes = [(0, 0), *(unpack_from(">II", size, 4) for size in _inside([meta[4:]], b"iprp", b"ipco", b"ispe"))]
    coded: dict[bytes, tuple[int, int]] = {}
    units = pixels = 0
    for stream in (*_av1_items(data, meta[4:]), *_first_samples(data)):
        size = (0, 0)
        for kind, body in _av1_units(stream):
            units += 1
            if kind == _SEQUENCE_HEADER:
                header = bytes(body[:_HEADER_BYTES])
                size = coded[header] = coded.get(header) or _coded_size(header)
            elif kind in _FRAMES and size == (0, 0):
                raise ValueError
            elif kind in _FRAMES:
                pixels += prod(size)
            if units > MAX_SEGMENTS or len(coded) > _MAX_HEADERS:
                raise too_many_segments()
    width, height = max((*sizes, *coded.values()), key=prod)
    if pixels > _MAX_FRAMES * width * height:
        raise too_many_segments()
    return width, height


def _inside(within: list[memoryview], *path: bytes) -> list[memoryview]:
    """Return the bodies of the boxes on this path of types."""
    for step in path:
        within = [body for outer in within for kind, body, _ in boxes(outer) if kind == step]
    return within


def _av1_items(data: memoryview, meta: memoryview) -> Iterator[memoryview]:
    """Yield the data of each item of AV1, from the file or from ``idat`` (14496-12, 8.11.3 and 8.11.6)."""
    ids = set()
    for items in _inside([meta], b"iinf"):
        for info in _inside([items[8 if items[0] else 6 :]], b"infe"):
            end = 8 if info[0] == 3 else 6
            if bytes(info[end + 2 : end + 6]) == b"av01":
                ids.add(bytes(info[4:end]).lstrip(b"\0"))
    stores = (data, memoryview(b"".join(_inside([meta], b"idat"))))
    joined = 0
    for iloc in _inside([meta], b"iloc") if ids else ():
        file, version, (sizes,) = BytesIO(iloc[6:]), iloc[0], unpack_from(">H", iloc, 4)
        if not sizes >> 8 & 15:  # extents of no bytes could be without end
            raise ValueError
        id_size, index_size = 4 if version == 2 else 2, sizes & 15 if version else 0
        for _ in range(_number(file, id_size)):
            is_av1 = file.read(id_size).lstrip(b"\0") in ids
            method = _number(file, 2) & 15 if version else 0
            _number(file, 2)
            base = _number(file, sizes >> 4 & 15)
            parts = []
            for _ in range(_number(file, 2)):
                _number(file, index_size)
                start = base + _number(file, sizes >> 12)
                length = _number(file, sizes >> 8 & 15)
                if is_av1:
                    parts.append(stores[method][start : start + length])
            joined += sum(map(len, parts[1:]))
            if joined > len(data):
                raise too_many_segments()
            yield parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _number(file: BytesIO, size: int) -> int:
    value = file.read(size)
    if len(value) < size:
        raise ValueError
    return int.from_bytes(value, "big")


def _first_samples(data: memoryview) -> Iterator[memoryview]:
    """Yield the first picture of each track of AV1, which is all that is decoded of it (14496-12, 8.7)."""
    for table in _inside([data], b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        if b"av01" in bytes(table):
            inner = [(kind, body) for kind, body, _ in boxes(table) if kind in (b"co64", b"stco", b"stsz")]
            (kind, chunks), (_, sizes) = sorted(inner, key=itemgetter(0))  # one of each, or it is damaged
            (start,) = unpack_from(">I" if kind == b"stco" else ">Q", chunks, 8)
            yield data[start : start + (unpack_from(">I", sizes, 4)[0] or unpack_from(">I", sizes, 12)[0])]


def _av1_units(stream: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the kind and the body of each open bitstream unit (AV1, 5.3 and 4.10.5)."""
    at = 0
    while at < len(stream):
        head = stream[at]
        at += 2 if head & 4 else 1
        length = len(stream) - at
        if head & 2:
            digits = _LEB128.match(stream, at)
            if digits is None:
                raise ValueError
            length, at = sum((byte & 127) << 7 * place for place, byte in enumerate(digits[0])), digits.end()
        yield head >> 3 & 15, stream[at : at + length]
        at += length


def _coded_size(header: bytes) -> tuple[int, int]:
    """Return the largest width and height of the frames, by their sequence header (AV1, 5.5)."""
    bits = iter("".join(f"{byte:08b}" for byte in header))

    def read(count: int) -> int:
        return int("0" + "".join(islice(bits, count)), 2)

    model_bits = 0
    if read(5) & 1:  # the reduced form, of a still picture
        read(5)
    else:
        if read(1):  # timing
            read(64)
            if read(1):
                read(next((zeros for zeros in range(32) if read(1)), 0))
            if read(1):
                model_bits = read(5) + 1
                read(42)
        has_delays = read(1)
        for _ in range(read(5) + 1):
            if read(17) & 31 > 7:
                read(1)
            if model_bits and read(1):
                read(2 * model_bits + 1)
            if has_delays and read(1):
                read(4)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    return read(width_bits) + 1, read(height_bits) + 1
