"""Mutations of sound bytes and of files made of chunks, the same for the same seed: what a hostile client could send."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random

_PNG = b"\x89PNG\r\n\x1a\n"
_LENGTHS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_INTEGERS = (("B", 0xFF), (">H", 0xFFFF), ("<H", 0xFFFF), (">I", 0xFFFFFFFF), ("<I", 0xFFFFFFFF))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG
_HOLDERS = {b"meta": 12, b"iprp": 8, b"ipco": 8, b"moov": 8, b"trak": 8}  # AVIF, HEIC: boxes of boxes, by their head's length
_HEADER_BYTES = 64  # half of the edits go there: past it most bytes are pixels


def mutations(seeds: Sequence[bytes], count: int, seed: int, *, swollen: float = 0.0) -> Iterator[bytes]:
    """Return ``count`` mutants of ``seeds``, each after one to four mutations; the same ones for the same ``seed``.

    A share of ``swollen`` has one of its parts repeated, up to 2 MiB: small to send and perhaps long to read.
    """
    random = Random(seed)
    for _ in range(count):
        data = random.choice(seeds)
        for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
            data = random.choice(_MUTATIONS)(data, seeds, random)
        if random.random() < swollen:
            data = _swell(data, random)
        # Checksums that hold let the damage through to what lies behind them.
        yield _with_sound_checksums(data) if random.random() < 0.5 else data


def _flip_bits(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    out = bytearray(data)
    for _ in range(random.randint(1, 8)):
        if out:
            out[_position(out, random)] ^= 1 << random.randrange(8)
    return bytes(out)


def _replace_bytes(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    start = _position(data, random)
    new = random.randbytes(random.randint(1, 8))
    return data[:start] + new + data[start + len(new) :]


def _edit_length(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    """Put a number that hurts, or one beside the file's own length, where a length or a size may be."""
    form, limit = random.choice(_INTEGERS)
    value = random.choice((*_LENGTHS, len(data) - 1, len(data), len(data) + 1, random.randrange(limit + 1)))
    new = struct.pack(form, max(value, 0) & limit)
    start = _position(data, random)
    return data[:start] + new + data[start + len(new) :]


def _truncate(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    return data[: random.randint(0, len(data))]


def _remove(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    start = _position(data, random)
    return data[:start] + data[start + random.randint(1, 64) :]


def _repeat(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    start = _position(data, random)
    end = start + random.randint(1, 64)
    return data[:end] + data[start:end] * random.randint(1, 4) + data[end:]


def _splice(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(seeds)
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


def _shuffle_chunks(data: bytes, seeds: Sequence[bytes], random: Random) -> bytes:
    """Swap, drop, repeat or take over chunks; what has none is cut into blocks."""
    head, *chunks = _chunks(data)
    if not chunks:
        return data
    first, second = random.randrange(len(chunks)), random.randrange(len(chunks))
    match random.randrange(4):
        case 0:
            chunks[first], chunks[second] = chunks[second], chunks[first]
        case 1:
            del chunks[first]
        case 2:
            chunks.insert(first, chunks[second])
        case _:
            chunks.insert(first, random.choice(_chunks(random.choice(seeds))))
    return b"".join((head, *chunks))


def _swell(data: bytes, random: Random) -> bytes:
    head, *chunks = _chunks(data)
    if not chunks or random.random() < 0.3:
        start = _position(data, random)
        head, chunks = data[:start], [data[start : start + random.randint(1, 8)], data[start:]]
    at = random.randrange(len(chunks))
    chunks.insert(at, chunks[at] * (2 ** random.randint(10, 21) // (len(chunks[at]) or 1)))
    return b"".join((head, *chunks))


_MUTATIONS: tuple[Callable[[bytes, Sequence[bytes], Random], bytes], ...] = (
    _flip_bits,
    _replace_bytes,
    _edit_length,
    _truncate,
    _remove,
    _repeat,
    _splice,
    _shuffle_chunks,
)


def _position(data: bytes | bytearray, random: Random) -> int:
    end = len(data) if random.random() < 0.5 else min(len(data), _HEADER_BYTES)
    return random.randrange(end) if end else 0


def _chunks(data: bytes) -> list[bytes]:
    """Cut ``data`` into its head and what follows, without loss: by the format's own lengths as far as they make sense."""
    if data.startswith(_PNG):
        return _cut(data, len(_PNG), lambda at: 12 + _number(">I", data, at))
    if data[:4] == b"RIFF":
        return _cut(data, 12, lambda at: 8 + (_number("<I", data, at + 4) + 1 & ~1))
    if data[:2] == b"\xff\xd8":
        return _cut(data, 2, lambda at: 2 + _number(">H", data, at + 2) if _MARKER.match(data, at) else _until_marker(data, at))
    if data[4:8] == b"ftyp":
        return _cut(data, 0, lambda at: _HOLDERS.get(data[at + 4 : at + 8], max(8, _number(">I", data, at))))
    if data[:4] == b"GIF8" and len(data) > 13:
        return _cut(data, 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0), lambda at: _gif_block(data, at))
    if b"\r\n" in data:
        return data.splitlines(keepends=True)
    return _cut(data, 16, lambda at: 32)


def _until_marker(data: bytes, at: int) -> int:
    found = _MARKER.search(data, at + 1)
    return found.start() - at if found else len(data)


def _gif_block(data: bytes, at: int) -> int:
    """Length of a label or an image's header, or of a run of data."""
    return {0x21: 2, 0x2C: 11}.get(data[at], 1 + data[at])


def _cut(data: bytes, start: int, length_at: Callable[[int], int]) -> list[bytes]:
    pieces = [data[:start]]
    while start < len(data):
        end = start + length_at(start)
        pieces.append(data[start:end])
        start = end
    return pieces


def _number(form: str, data: bytes, start: int) -> int:
    """Read one number; behind the end there is none, and 0."""
    return int(struct.unpack_from(form, data.ljust(start + 4, b"\0"), start)[0])


def _with_sound_checksums(data: bytes) -> bytes:
    if not data.startswith(_PNG):
        return data
    head, *chunks = _chunks(data)
    return head + b"".join(
        chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk for chunk in chunks
    )
