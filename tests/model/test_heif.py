"""How large an AVIF or HEIC counts: as large as what its decoder makes, whatever the file says around it."""

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


def put_together(
    kind: str, of_type: bytes, body: bytes, tiles: list[Image.Image], uses: list[int], size: tuple[int, int], *, turns: int = 0
) -> bytes:
    """A file whose picture, which it says has ``size``, is made of ``tiles``; ``uses`` are their numbers, from 1."""
    name, item, brands = {
        "AVIF": (b"av1C", b"av01\0", (b"avif", b"avifmif1miaf")),
        "HEIC": (b"hvcC", b"hvc1\0", (b"heic", b"heicmif1")),
    }[kind]
    files = [encoded(tile, kind, quality=95) for tile in tiles]
    streams = [file[file.rindex(b"mdat") + 4 :] for file in files]
    at = files[0].index(name) - 4
    configuration = files[0][at : at + struct.unpack_from(">I", files[0], at)[0]]
    last = len(tiles) + 1
    head = b""
    for _ in range(2):  # the second time with its own length known
        starts = [len(head) + 8 + sum(map(len, streams[:number])) for number in range(len(streams))]
        places = [
            struct.pack(">HHHHII", number, 0, 0, 1, start, len(stream))
            for number, (start, stream) in enumerate(zip(starts, streams, strict=True), 1)
        ]
        infos = [full_box(b"infe", struct.pack(">HH", number, 0), item, version=2) for number in range(1, last)]
        meta = full_box(
            b"meta",
            full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", struct.pack(">H", last)),
            full_box(
                b"iinf",
                struct.pack(">H", last),
                *infos,
                full_box(b"infe", struct.pack(">HH", last, 0), of_type + b"\0", version=2),
            ),
            full_box(b"iref", box(b"dimg", struct.pack(f">HH{len(uses)}H", last, len(uses), *uses))),
            full_box(
                b"iloc",
                struct.pack(">HH", 0x4400, last),
                *places,
                struct.pack(">HHHHII", last, 1, 0, 1, 0, len(body)),
                version=1,
            ),
            box(
                b"iprp",
                box(
                    b"ipco",
                    full_box(b"ispe", struct.pack(">II", *tiles[0].size)),
                    configuration,
                    full_box(b"pixi", b"\3\x08\x08\x08"),
                    full_box(b"ispe", struct.pack(">II", *size)),
                    box(b"irot", bytes((turns,))),
                ),
                full_box(
                    b"ipma",
                    struct.pack(">I", last),
                    *(struct.pack(">HB", number, 3) + b"\1\x82\3" for number in range(1, last)),
                    struct.pack(">HB", last, 3) + b"\4\3\x85",
                ),
            ),
            box(b"idat", body),
        )
        head = box(b"ftyp", brands[0], bytes(4), brands[1]) + meta
    return head + box(b"mdat", *streams)


def grid_of(rows: int, columns: int, size: tuple[int, int]) -> bytes:
    return struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *size)


def overlay_of(count: int, size: tuple[int, int]) -> bytes:
    return struct.pack(">BB6H", 0, 0, 0, 0, 0, 65_535, *size) + bytes(4 * count)


def unit(kind: int, bits: str) -> bytes:
    """An open bitstream unit of AV1 of less than 16 kB."""
    body = int("0" + bits, 2).to_bytes(-(-len(bits) // 8), "big")
    return bytes((kind << 3 | 2, len(body) & 127 | 128, len(body) >> 7)) + body


def av1_with_a_size_of_its_own() -> bytes:
    """A sequence header that says ``SMALL``, in 12 bits, and a frame that says ``SIDE``."""
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("black", "red")]
    data = encoded(pictures[0], "AVIF", speed=10, save_all=True, append_images=pictures[1:])
    stream = data[data.rindex(b"mdat") + 4 :]
    header, frame = stream.index(b"\x0a") + 2, stream.index(b"\x32") + 3
    bits = "".join(f"{byte:08b}" for byte in stream[header : header + stream[header - 1]])
    assert bits[29:37] == "10011001", "10 bits for the width, 10 for the height"
    first = unit(1, bits[:29] + "10111011" + 2 * f"{SMALL - 1:012b}" + bits[57 : len(bits) // 8 * 8] + 4 * "0")
    bits = "".join(f"{byte:08b}" for byte in stream[frame : frame + (stream[frame - 2] & 127 | stream[frame - 1] << 7)])
    return b"\x12\0" + first + unit(6, bits[:6] + "1" + bits[7:14] + 2 * f"{SIDE - 1:012b}" + bits[14:])


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


def test_a_frame_that_says_its_own_size_counts_as_the_largest_that_it_can_say() -> None:
    """Its decoder takes that, though it is more than the sequence allows."""
    data = avif_of(av1_with_a_size_of_its_own())
    assert counted(data) == 4096 * 4096
    assert decode_image(data, SPEC).shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_grid_of_tiles_is_one_picture(kind: str, turns: int) -> None:
    """As phones write it: tiles of one size, of which the last ones reach over the edge."""
    picture = Image.linear_gradient("L").resize((500, 300)).convert("RGB")
    picture.paste((200, 40, 90), (260, 0, 420, 200))
    tiles = [picture.crop((x, y, x + 256, y + 256)) for y in (0, 256) for x in (0, 256)]
    data = put_together(kind, b"grid", grid_of(2, 2, picture.size), tiles, [1, 2, 3, 4], picture.size, turns=turns)
    assert counted(data) == 500 * 300
    upright = picture.rotate(90 * turns, expand=True)
    difference = decode_image(data, SPEC).astype(int) - decode_image(encoded(upright), SPEC)
    assert abs(difference).max() <= 4
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(data[:-50], SPEC)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
@pytest.mark.parametrize(("of_type", "body"), [(b"grid", grid_of(1, 1, (9000, 9000))), (b"iovl", overlay_of(1, (9000, 9000)))])
def test_what_is_put_together_counts_as_large_as_it_becomes(kind: str, of_type: bytes, body: bytes) -> None:
    """The property says that it is small; the memory is taken before the two are compared."""
    data = put_together(kind, of_type, body, [Image.new("RGB", (64, 64))], [1], (64, 64))
    with pytest.raises(ImageTooLarge, match="9000 x 9000"):
        decode_image(data, SPEC)


def test_one_tile_that_is_used_again_and_again_is_refused() -> None:
    """It is decoded each time: three kilobytes could keep a thread for minutes."""
    data = put_together("HEIC", b"grid", grid_of(5, 6, (64, 64)), [Image.new("RGB", (64, 64))], [1] * 30, (64, 64))
    with pytest.raises(InvalidImage, match="cost too much to decode"):
        decode_image(data, SPEC)


def test_a_picture_that_is_made_of_itself_is_damage() -> None:
    """The walk through its parts ends."""
    data = put_together("HEIC", b"grid", grid_of(1, 1, (64, 64)), [Image.new("RGB", (64, 64))], [2], (64, 64))
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(data, SPEC)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
@pytest.mark.parametrize("rest", [b"\0", b"\r\n", b"\0\0\x61\x08SEFH" + bytes(99) + b"SEFT"])
def test_what_devices_append_is_passed_over(kind: str, rest: bytes) -> None:
    """It is no box, and every viewer shows the picture before it."""
    data = encoded(Image.linear_gradient("L").convert("RGB"), kind)
    assert (decode_image(data + rest, SPEC) == decode_image(data, SPEC)).all()


@pytest.mark.parametrize(
    "boxes",
    [
        box(b"moov", box(b"free") * 2000) * 9,
        box(b"moov", box(b"trak", box(b"free") * 2000) * 9),
        b"".join(box(b"moov", box(b"trak", box(b"mdia"))) for _ in range(4000)),
    ],
    ids=["in several", "in one another", "deep"],
)
def test_all_boxes_of_a_file_count_together(boxes: bytes) -> None:
    """Sixteen megabytes of them would keep the event loop for seconds, where each box has a bound of its own."""
    with pytest.raises(InvalidImage, match="too many segments"):
        EncodedImage(encoded(Image.new("RGB", (64, 64)), "AVIF") + boxes, SPEC)
