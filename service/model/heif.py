"""Boxes of AVIF and HEIC files (ISO/IEC 14496-12 and 23008-12), and how large the pictures are that a decoder makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from itertools import islice
from math import prod
from operator import itemgetter
from struct import unpack_from

from service.model.formats import segments, too_many_segments

# All frames of AV1, or parts of a picture, in pictures of the largest size. A grid of padded tiles with alpha has up to 8.
_MAX_FRAMES = 16
_MAX_HEADERS = 100  # AV1: different ones; the tiles of a picture have the same
_HEADER_BYTES = 400  # AV1: the size of a sequence lies within them
_SEQUENCE_HEADER, _FRAMES = 1, (3, 6, 7)  # AV1: kinds of units
_SWITCH_FRAME, _EACH_SAYS = 3, 2  # AV1: a kind of frames; what each frame says for itself
_CANVASES = {b"grid": 4, b"iovl": 10}  # items put together of others, and where their size lies (23008-12, 6.6.2)
_MAX_DEPTH = 4  # of such items in one another
_LEB128 = re.compile(rb"[\x80-\xff]{0,7}[\0-\x7f]")


Box = tuple[bytes, memoryview, int]
"""The type of a box, its body and where it ends."""


def split(data: memoryview, count: Iterator[int], *, is_file: bool = False) -> list[Box]:
    """Return the boxes in ``data`` (14496-12, 4.2), each counted by ``count``; raise ValueError for what is no box.

    In a file, what is no box ends it: devices append data of their own.
    """
    found: list[Box] = []
    at = 0
    while at < len(data):
        head, length, kind = 8, int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
        if length == 1:
            head, length = 16, int.from_bytes(data[at + 8 : at + 16], "big")
        end = at + length if length else len(data)
        if end > len(data) or end < at + head:
            if is_file:
                break
            raise ValueError
        found.append((kind, data[at + head : end], end))
        next(count)
        at = end
    return found


def _inside(count: Iterator[int], within: list[memoryview], *path: bytes) -> list[memoryview]:
    """Return the bodies of the boxes on this path of types."""
    for step in path:
        within = [body for outer in within for kind, body, _ in split(outer, count) if kind == step]
    return within


def largest_size(data: memoryview, meta: memoryview, count: Iterator[int]) -> tuple[int, int]:
    """Return width and height of the largest picture, by the items' properties, by what is put together and by AV1's headers.

    A decoder makes what these say and only then compares it with the property, or scales it to that. Of HEVC, libheif
    refuses what is larger than the property. ``count`` counts the boxes, those that are split again counted again. Raises
    ValueError, IndexError, struct.error, and InvalidImage for more than can be looked at.
    """
    sizes = [(0, 0), *(unpack_from(">II", size, 4) for size in _inside(count, [meta[4:]], b"iprp", b"ipco", b"ispe"))]
    read_sequence = cache(_Sequence)
    pixels, units = 0, segments()
    for item_type, stream in (*_items(data, meta[4:], count), *_first_samples(data, count)):
        if item_type != b"av01":
            sizes.append(unpack_from(">II" if stream[1] & 1 else ">HH", stream, _CANVASES[item_type]))
            continue
        sequence = None
        for kind, body in _av1_units(stream):
            next(units)
            if kind == _SEQUENCE_HEADER:
                sequence = read_sequence(bytes(body[:_HEADER_BYTES]))
                sizes.append(sequence.size)
            elif kind in _FRAMES:
                if sequence is None:
                    raise ValueError
                sizes.append(sequence.frame_size(bytes(body[:16])))
                pixels += prod(sizes[-1])
            if read_sequence.cache_info().currsize > _MAX_HEADERS:
                raise too_many_segments()
    width, height = max(sizes, key=prod)
    if max(pixels, _pixels_put_together(meta[4:], count)) > _MAX_FRAMES * width * height:
        raise too_many_segments()
    return width, height


def _pixels_put_together(meta: memoryview, count: Iterator[int]) -> int:
    """Return the pixels of all pictures that the costliest item is made of, each as often as it is used (23008-12, 6.6)."""
    pixels: dict[int, int] = {}
    parts: dict[int, list[int]] = {}
    properties = [body for outer in _inside(count, [meta], b"iprp", b"ipco") for body in split(outer, count)]
    for table in _inside(count, [meta], b"iprp", b"ipma"):
        file = BytesIO(table[4:])
        for _ in range(_number(file, 4)):
            item = _number(file, 4 if table[0] else 2)
            for _ in range(_number(file, 1)):
                at = _number(file, 2) & 0x7FFF if table[3] & 1 else _number(file, 1) & 0x7F
                if at and properties[at - 1][0] == b"ispe":
                    pixels[item] = prod(unpack_from(">II", properties[at - 1][1], 4))
    for references in _inside(count, [meta], b"iref"):
        size = 4 if references[0] else 2
        for derived in _inside(count, [references[4:]], b"dimg"):
            file = BytesIO(derived)
            item = _number(file, size)
            parts[item] = [_number(file, size) for _ in range(_number(file, 2))]

    @cache
    def total(item: int, depth: int = 0) -> int:
        if depth > _MAX_DEPTH:
            raise ValueError
        return pixels.get(item, 0) + sum(total(part, depth + 1) for part in parts.get(item, ()))

    return max(map(total, parts), default=0)


def _items(data: memoryview, meta: memoryview, count: Iterator[int]) -> Iterator[tuple[bytes, memoryview]]:
    """Yield type and data of each item that says a size, from the file or from ``idat`` (14496-12, 8.11.3 and 8.11.6)."""
    types: dict[bytes, bytes] = {}
    for items in _inside(count, [meta], b"iinf"):
        for info in _inside(count, [items[8 if items[0] else 6 :]], b"infe"):
            end = 8 if info[0] == 3 else 6
            types[bytes(info[4:end]).lstrip(b"\0")] = bytes(info[end + 2 : end + 6])
    stores = (data, memoryview(b"".join(_inside(count, [meta], b"idat"))))
    joined = 0
    for iloc in _inside(count, [meta], b"iloc"):
        file, version, (sizes,) = BytesIO(iloc[6:]), iloc[0], unpack_from(">H", iloc, 4)
        if not sizes >> 8 & 15:  # extents of no bytes could be without end
            raise ValueError
        id_size, index_size = 4 if version == 2 else 2, sizes & 15 if version else 0
        for _ in range(_number(file, id_size)):
            item_type = types.get(file.read(id_size).lstrip(b"\0"))
            is_wanted = item_type == b"av01" or item_type in _CANVASES
            method = _number(file, 2) & 15 if version else 0
            _number(file, 2)
            base = _number(file, sizes >> 4 & 15)
            parts = []
            for _ in range(_number(file, 2)):
                _number(file, index_size)
                start = base + _number(file, sizes >> 12)
                length = _number(file, sizes >> 8 & 15)
                if is_wanted:
                    parts.append(stores[method][start : start + length])
            joined += sum(map(len, parts[1:]))
            if joined > len(data):
                raise too_many_segments()
            if item_type and parts:
                yield item_type, parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _number(file: BytesIO, size: int) -> int:
    value = file.read(size)
    if len(value) < size:
        raise ValueError
    return int.from_bytes(value, "big")


def _first_samples(data: memoryview, count: Iterator[int]) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the first picture of each track of AV1, which is all that is decoded of it (14496-12, 8.7)."""
    for table in _inside(count, [data], b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        if b"av01" in bytes(table):
            inner = [(kind, body) for kind, body, _ in split(table, count) if kind in (b"co64", b"stco", b"stsz")]
            (kind, chunks), (_, sizes) = sorted(inner, key=itemgetter(0))  # one of each, or it is damaged
            (start,) = unpack_from(">I" if kind == b"stco" else ">Q", chunks, 8)
            yield b"av01", data[start : start + (unpack_from(">I", sizes, 4)[0] or unpack_from(">I", sizes, 12)[0])]


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


def _reader(data: bytes) -> Callable[[int], int]:
    bits = iter("".join(f"{byte:08b}" for byte in data))
    return lambda count: int("0" + "".join(islice(bits, count)), 2)


class _Sequence:
    """Of a sequence header of AV1, what bounds its frames and what comes before their size (AV1, 5.5)."""

    def __init__(self, header: bytes) -> None:
        read = _reader(header)
        model_bits = self._time_bits = 0
        self._is_reduced = bool(read(5) & 1)  # the form for a still picture
        if self._is_reduced:
            read(5)
        else:
            if read(1):  # timing
                read(64)
                if is_regular := read(1):
                    read(next((zeros for zeros in range(32) if read(1)), 0))
                if read(1):
                    model_bits = read(5) + 1
                    read(37)
                    self._time_bits = (read(5) + 1) * (not is_regular)
            has_delays = read(1)
            for _ in range(read(5) + 1):
                if read(17) & 31 > 7:
                    read(1)
                if model_bits and read(1):
                    read(2 * model_bits + 1)
                if has_delays and read(1):
                    read(4)
        width_bits, height_bits = read(4) + 1, read(4) + 1
        self.size = read(width_bits) + 1, read(height_bits) + 1
        self._largest = 1 << width_bits, 1 << height_bits  # that a frame can have
        if self._is_reduced:
            return
        self._id_bits = read(4) + read(3) + 3 if read(1) else 0
        read(7)
        if read(1):  # order
            read(2)
        self._screen_tools = _EACH_SAYS if read(1) else read(1)
        self._whole_vectors = _EACH_SAYS if not self._screen_tools or read(1) else read(1)

    def frame_size(self, header: bytes) -> tuple[int, int]:
        """Return the size of a frame; one that has its own counts as the largest that it can have (AV1, 5.9.2)."""
        read = _reader(header)
        if self._is_reduced or read(1):  # shows a frame of before
            return self.size
        kind, is_shown = read(2), read(1)
        read(self._time_bits if is_shown else 1)
        if kind != _SWITCH_FRAME and (kind or not is_shown):
            read(1)
        read(1)
        if (read(1) if self._screen_tools == _EACH_SAYS else self._screen_tools) and self._whole_vectors == _EACH_SAYS:
            read(1)
        read(self._id_bits)
        return self._largest if kind == _SWITCH_FRAME or read(1) else self.size
