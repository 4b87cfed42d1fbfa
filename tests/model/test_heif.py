"""How large an AVIF counts: as large as what its decoder makes, whatever the file says around it."""

from __future__ import annotations

import struct

import pytest
from PIL import Image

from service.errors import ImageTooLarge, InvalidImage
from service.model.images import EncodedImage, InputSpec, decode_image
from tests.support.image_file import encoded

SPEC = InputSpec()
SIDE, SMALL = 1000, 64
BYTES_PER_PIXEL = 20
SIXTEEN_BITS = "00000" + "0" + "0" + "00000" + 17 * "0" + "1111" + "1111" + 2 * f"{SIDE - 1:016b}" + 27 * "0"


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def full_box(kind: bytes, *parts: bytes, version: int = 0) -> bytes:
    return box(kind, bytes((version, 0, 0, 0)), *parts)


def av1_of(side: int) -> tuple[bytes, bytes]:
    """The sequence header of a black picture with the units before it, and the rest."""
    data = encoded(Image.new("RGB", (side, side)), "AVIF", speed=10)
    stream = data[data.rindex(b"mdat") + 4 :]
    end = stream.index(b"\x0a")
    end += 2 + stream[end + 1]
    return stream[:end], stream[end:]


def avif_of(stream: bytes, *, cuts: tuple[int, ...] = (), is_inside: bool = False, is_long: bool = False) -> bytes:
    """A file that says its picture has ``SMALL`` pixels a side; its data in extents, in ``idat``, in a box of 64-bit size."""
    whole = encoded(Image.new("RGB", (SMALL, SMALL)), "AVIF", speed=10)
    av1c = whole.index(b"av1C") - 4
    ends = (*cuts, len(stream))
    start, meta = 0, b""
    for _ in range(2):  # the second time with its own length known
        extents = b"".join(struct.pack(">II", start + a, b - a) for a, b in zip((0, *cuts), ends, strict=True))
        place = struct.pack(">HHHH", 1, is_inside, 0, len(ends)) + extents
        meta = full_box(
            b"meta",
            full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", struct.pack(">H", 1)),
            full_box(b"iinf", struct.pack(">H", 1), full_box(b"infe", struct.pack(">HH", 1, 0), b"av01\0", version=2)),
            full_box(b"iloc", struct.pack(">HH", 0x4400, 1), place, version=1),
            box(
                b"iprp",
                box(
                    b"ipco",
                    full_box(b"ispe", struct.pack(">II", SMALL, SMALL)),
                    whole[av1c : av1c + struct.unpack_from(">I", whole, av1c)[0]],
                    full_box(b"pixi", b"\3\x08\x08\x08"),
                ),
                full_box(b"ipma", struct.pack(">IHB", 1, 1, 3), b"\1\x82\3"),
            ),
            box(b"idat", stream) if is_inside else b"",
        )
        head = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf") + meta
        start = 0 if is_inside else len(head) + (16 if is_long else 8)
    if is_long:
        return head + struct.pack(">I4sQ", 1, b"mdat", 16 + len(stream)) + stream
    return head + (b"" if is_inside else box(b"mdat", stream))


def shrunk(data: bytes) -> bytes:
    """The same data under properties, and a track's, that say ``SMALL``."""
    data = data.replace(struct.pack(">II", SIDE, SIDE), struct.pack(">II", SMALL, SMALL))
    return data.replace(struct.pack(">II", SIDE << 16, SIDE << 16), struct.pack(">II", SMALL << 16, SMALL << 16))


def counted(data: bytes) -> int:
    """The pixels that ``data`` counts for in the memory that it takes."""
    return (EncodedImage(data, SPEC).memory_bytes() - len(data)) // BYTES_PER_PIXEL


HEADER, FRAME = av1_of(SIDE)
LARGE = HEADER + FRAME
BLACK = Image.new("RGB", (SIDE, SIDE))
FILES = {
    "one extent": avif_of(LARGE),
    "several extents": avif_of(LARGE, cuts=(len(HEADER) - 3, len(HEADER) + 3)),
    "in the properties": avif_of(LARGE, is_inside=True),
    "in a box of 64-bit size": avif_of(LARGE, is_long=True),
    "after the header of a small one": avif_of(av1_of(SMALL)[0] + LARGE),
    "a header with an extension": avif_of(HEADER.replace(b"\x0a", b"\x0e\0", 1) + FRAME),
    "with alpha": shrunk(encoded(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "AVIF", speed=10)),
    "a sequence": shrunk(encoded(BLACK, "AVIF", speed=10, save_all=True, append_images=[Image.new("RGB", BLACK.size, "red")])),
}


@pytest.mark.parametrize("name", FILES)
def test_an_avif_counts_as_large_as_its_decoder_makes_it(name: str) -> None:
    """Its properties say that it is small; the decoder makes what the AV1 data says and scales it down."""
    assert counted(FILES[name]) == SIDE * SIDE
    assert decode_image(FILES[name], SPEC).shape == (3, 32, 32)
    with pytest.raises(ImageTooLarge, match="1000 x 1000"):
        decode_image(FILES[name], SPEC, max_pixels=SIDE * SIDE - 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("frames", [1, 3])
def test_an_honest_avif_counts_as_large_as_it_is(mode: str, frames: int) -> None:
    """Also one that is no multiple of a block, and a sequence, whose first picture is taken."""
    images = [Image.new(mode, (333, 65), index) for index in range(frames)]
    assert counted(encoded(images[0], "AVIF", speed=10, save_all=frames > 1, append_images=images[1:])) == 333 * 65


def test_a_header_whose_size_has_more_bits_than_it_needs_is_read() -> None:
    """Encoders for video always write 16, and more fields than those for pictures."""
    header = int(SIXTEEN_BITS, 2).to_bytes(len(SIXTEEN_BITS) // 8, "big")
    assert counted(avif_of(b"\x0a" + bytes((len(header),)) + header)) == SIDE * SIDE


def test_an_avif_of_many_frames_is_refused() -> None:
    """A decoder goes over each of them, shown or not."""
    with pytest.raises(InvalidImage, match="cost too much to decode"):
        decode_image(avif_of(HEADER + FRAME * 20), SPEC)
    with pytest.raises(InvalidImage, match="cost too much to decode"):
        decode_image(avif_of(HEADER + b"\x7a\0" * 10_000 + FRAME), SPEC)


def test_frames_without_a_header_are_damage() -> None:
    """Nothing says how large they are."""
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(avif_of(FRAME), SPEC)
