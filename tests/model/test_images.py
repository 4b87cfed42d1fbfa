"""Encoded bytes to uint8 arrays: every format, mode, orientation and limit, and every bad image a typed error."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from service.errors import DeadlineExceeded, ImageTooLarge, InvalidImage, ServiceError, UnsupportedMediaType
from service.model.formats import FORMATS
from service.model.images import QUICK_BYTES, QUICK_JPEG_BYTES, QUICK_PIXELS, EncodedImage, InputSpec, decode_image
from service.routes.decoder import Decoder
from service.web.memory_budget import MemoryBudget
from tests.support.image_file import encoded
from training.data.folder import load_folder

SPEC = InputSpec()
WHITE = (255, 255, 255)


def photo(width: int = 200, height: int = 150) -> Image.Image:
    """A smooth RGB picture, another colour in every corner, that every format keeps nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    across, down = x / max(width - 1, 1), y / max(height - 1, 1)
    pixels = np.stack([40 + 180 * across, 30 + 190 * down, 220 - 100 * across - 90 * down], axis=-1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def small_photo() -> Image.Image:
    """The same picture in the size of the network's input, where decoding does not resample."""
    return photo(SPEC.size, SPEC.size)


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """What an RGB image is as an array of shape (3, H, W)."""
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def plain(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An input whose every pixel has one colour."""
    return np.tile(np.array(colour, np.uint8).reshape(3, 1, 1), (1, SPEC.size, SPEC.size))


def furthest(result: NDArray[np.uint8], expected: NDArray[np.uint8]) -> int:
    """The largest difference of two arrays of one shape, in 0..255."""
    assert result.shape == expected.shape
    return int(np.abs(result.astype(int) - expected.astype(int)).max())


def png_header(width: int, height: int, *, bits: int = 8, colour_type: int = 2) -> bytes:
    """The signature and the IHDR chunk of a PNG (ISO 15948, clauses 5.2 and 11.2.2)."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def large_png(width: int, height: int) -> bytes:
    """A sound black RGB PNG, compressed about a thousandfold, made without holding its pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    return png_header(width, height) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


# Formats


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WebP", {"lossless": True}, 0),
        ("WebP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 12),
        ("GIF", {}, 40),  # 256 colours
        ("AVIF", {"quality": 95}, 12),
        ("HEIC", {"quality": 95}, 16),
    ],
)
def test_every_format_gives_its_pixels(kind: str, options: dict[str, Any], tolerance: int) -> None:
    """A picture of the input's size comes out as it was stored: exactly where the format is lossless."""
    assert kind in FORMATS
    result = decode_image(encoded(small_photo(), kind, **options), SPEC)
    assert result.dtype == np.uint8
    assert result.shape == (3, SPEC.size, SPEC.size)
    assert result.flags.c_contiguous
    assert furthest(result, pixels_of(small_photo())) <= tolerance


def test_no_format_goes_untested() -> None:
    """Every accepted format is one of those that the test above encodes."""
    assert set(FORMATS) == {"PNG", "BMP", "WebP", "JPEG", "GIF", "AVIF", "HEIC"}


def test_sample_images_come_out_bit_exact(image_paths: list[Path]) -> None:
    """A 32x32 RGB PNG is not touched by resampling or conversion."""
    for path in image_paths:
        with Image.open(path) as image:
            expected = pixels_of(image)
        np.testing.assert_array_equal(decode_image(path.read_bytes(), SPEC), expected)


@pytest.mark.parametrize("kind", ["GIF", "WebP", "PNG"])
def test_an_animation_counts_by_its_first_frame(kind: str) -> None:
    """Of an animated image the first frame is classified, not the last or a blend."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WebP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    np.testing.assert_array_equal(decode_image(data, SPEC), plain((250, 0, 0)))


def test_a_phone_s_multi_picture_jpeg_is_a_jpeg() -> None:
    """An MPO file, which starts as a JPEG, gives its first picture."""
    data = encoded(small_photo(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))], quality=95)
    assert furthest(decode_image(data, SPEC), pixels_of(small_photo())) <= 12


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_a_view_of_a_body_is_taken(wrap: type) -> None:
    """A part of a request's body is decoded where it lies, without being cut out first."""
    data = encoded(small_photo())
    np.testing.assert_array_equal(decode_image(wrap(data), SPEC), pixels_of(small_photo()))


# Modes


def test_grey_becomes_three_equal_channels() -> None:
    """A grey image has the same value in red, green and blue."""
    grey = small_photo().convert("L")
    for data in (encoded(grey), encoded(grey, "JPEG", quality=100), encoded(grey, "BMP")):
        result = decode_image(data, SPEC)
        assert furthest(result, np.stack([np.asarray(grey)] * 3)) <= 2


def test_one_bit_images_are_black_and_white() -> None:
    """A bitmap's two values become 0 and 255."""
    bitmap = small_photo().convert("1")
    np.testing.assert_array_equal(decode_image(encoded(bitmap), SPEC), pixels_of(bitmap))


def test_palette_colours_are_looked_up() -> None:
    """A palette image gives its colours, not its indices."""
    palette = small_photo().quantize(64)
    assert palette.mode == "P"
    for kind in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(decode_image(encoded(palette, kind), SPEC), pixels_of(palette))


@pytest.mark.parametrize("size", [(32, 32), (500, 400)])
def test_cmyk_is_converted(size: tuple[int, int]) -> None:
    """A CMYK JPEG, as from a print shop, shows its colours, not their negative, also at reduced scale."""
    result = decode_image(encoded(photo(*size).convert("CMYK"), "JPEG", quality=95), SPEC)
    assert furthest(result, decode_image(encoded(photo(*size)), SPEC)) <= 12


@pytest.mark.parametrize("size", [(32, 32), (200, 100)])
def test_16_bit_grey_is_scaled(size: tuple[int, int]) -> None:
    """A 16-bit grey PNG keeps its range: Pillow's own conversion would clip nearly all of it to white."""
    grey = np.asarray(photo(*size).convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 255)
    np.testing.assert_array_equal(decode_image(encoded(deep), SPEC), decode_image(encoded(Image.fromarray(grey)), SPEC))


def test_16_bit_rgb_is_scaled() -> None:
    """Of 16-bit colour the high bytes count."""
    deep = np.asarray(small_photo()).astype(">u2") * 256 + 255
    rows = b"".join(b"\0" + row.tobytes() for row in deep.astype(">u2"))
    data = png_header(32, 32, bits=16) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(data, SPEC), pixels_of(small_photo()))


def transparent_files() -> list[tuple[str, bytes]]:
    """Files of a 64x64 image whose left half is blue and whose right half is transparent over red."""
    rgba = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 32, 64))
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(0, (0, 0, 32, 64))
    keyed = Image.new("RGB", (64, 64), (255, 0, 0))
    keyed.paste((0, 0, 255), (0, 0, 32, 64))
    return [
        ("RGBA PNG", encoded(rgba)),
        ("RGBA WebP", encoded(rgba, "WebP", lossless=True, exact=True)),
        ("palette PNG with one transparent index", encoded(palette, transparency=1)),
        ("palette PNG with alpha for each index", encoded(palette, transparency=b"\xff\x00")),
        ("palette GIF", encoded(palette, "GIF", transparency=1)),
        ("RGB PNG with a transparent colour", encoded(keyed, transparency=(255, 0, 0))),
    ]


@pytest.mark.parametrize(("name", "data"), transparent_files(), ids=[name for name, _ in transparent_files()])
def test_transparency_is_laid_on_white(name: str, data: bytes) -> None:
    """Transparent pixels are white whatever colour hides below them, and that colour does not bleed over the edge."""
    result = decode_image(data, SPEC)
    np.testing.assert_array_equal(result[:, :, :15], plain((0, 0, 255))[:, :, :15])
    np.testing.assert_array_equal(result[:, :, 17:], plain(WHITE)[:, :, 17:])
    red, _green, blue = result.astype(int)
    assert (blue == 255).all(), f"{name}: the edge goes from blue to white and nowhere through red"
    assert (np.diff(red, axis=1) >= 0).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    """Alpha 128 over white gives half the colour and half white; grey with alpha likewise."""
    half = Image.new("RGBA", (32, 32), (200, 100, 0, 128))
    assert furthest(decode_image(encoded(half), SPEC), plain((227, 177, 127))) <= 1
    grey = Image.new("LA", (32, 32), (100, 128))
    assert furthest(decode_image(encoded(grey), SPEC), plain((177, 177, 177))) <= 1


# Geometry


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (31, 33), (33, 32), (3000, 20)])
def test_any_size_is_brought_to_the_input_s(size: tuple[int, int]) -> None:
    """The smallest and the narrowest images are classified like any other."""
    colour = (10, 120, 230)
    np.testing.assert_array_equal(decode_image(encoded(Image.new("RGB", size, colour)), SPEC), plain(colour))


def test_crop_keeps_the_centre_and_squash_keeps_all() -> None:
    """``crop`` scales the shorter side and drops what lies outside the centred square; ``squash`` drops nothing."""
    image = Image.new("RGB", (96, 32), (255, 0, 0))
    image.paste((0, 255, 0), (32, 0, 64, 32))
    data = encoded(image)
    np.testing.assert_array_equal(decode_image(data, InputSpec(fit="crop")), plain((0, 255, 0)))
    squashed = decode_image(data, InputSpec(fit="squash"))
    np.testing.assert_array_equal(squashed[0, :, [0, 15, 31]], np.repeat([[255], [0], [255]], 32, 1))


def test_resampling_averages_instead_of_skipping() -> None:
    """A fine checkerboard scaled down is even grey, not a pattern of aliases."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    result = decode_image(encoded(Image.fromarray(board)), SPEC).astype(int)
    assert abs(result - 127).max() <= 3


@pytest.mark.parametrize("size", [8, 64, 224])
def test_the_spec_s_size_is_obeyed(size: int) -> None:
    """Networks for other sizes get theirs."""
    assert decode_image(encoded(photo()), InputSpec(size=size)).shape == (3, size, size)


@pytest.mark.parametrize(
    "values", [{"size": 0}, {"fit": "stretch"}, {"std": (0.2, 0.0, 0.2)}, {"mean": (0.5,)}, {"std": (0.5, 0.5)}]
)
def test_an_impossible_spec_is_refused(values: dict[str, Any]) -> None:
    """A spec that no image can meet fails where it is made."""
    with pytest.raises(ValueError, match="an input spec needs"):
        InputSpec(**values)


# Orientation


@pytest.mark.parametrize(
    ("kind", "options", "fit"),
    [
        ("JPEG", {"quality": 95}, "crop"),
        ("JPEG", {"quality": 95}, "squash"),
        ("JPEG", {"quality": 95, "progressive": True}, "crop"),
        ("PNG", {}, "crop"),
        ("WebP", {"lossless": True}, "crop"),
        ("AVIF", {"quality": 95}, "crop"),
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str, options: dict[str, Any], fit: Any) -> None:
    """A picture is upright as its camera noted, exactly as if it were turned before it is scaled."""
    spec = InputSpec(fit=fit)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(160, 96), kind, exif=exif, **options)
    with Image.open(BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert upright.size == ((160, 96) if orientation <= 4 else (96, 160))
    is_reduced_by_its_decoder = kind == "JPEG"
    assert furthest(decode_image(data, spec), decode_image(encoded(upright), spec)) <= 2 * is_reduced_by_its_decoder


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0", b"Exif\0\0nonsense", b"\xff" * 40])
def test_damaged_metadata_does_not_spoil_a_sound_image(exif: bytes) -> None:
    """Pixels that decode are classified even if the EXIF block beside them is broken."""
    result = decode_image(encoded(small_photo(), exif=exif), SPEC)
    np.testing.assert_array_equal(result, pixels_of(small_photo()))


def test_an_unknown_orientation_is_ignored() -> None:
    """Values outside 1..8 occur in the wild and mean nothing."""
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        np.testing.assert_array_equal(decode_image(encoded(small_photo(), exif=exif), SPEC), pixels_of(small_photo()))


# Large images


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_12_megapixel_photo_comes_out_as_at_full_scale(options: dict[str, Any]) -> None:
    """A camera's JPEG is decoded at one eighth of its sides, which moves its pixels by a few levels only."""
    picture = photo(4000, 3000)
    result = decode_image(encoded(picture, "JPEG", quality=90, **options), SPEC)
    expected = picture.crop((500, 0, 3500, 3000)).resize((32, 32), Image.Resampling.BOX)
    assert furthest(result, pixels_of(expected)) <= 4


def test_the_pixel_limit_counts_what_is_decoded_of_a_jpeg() -> None:
    """A photograph of 108 megapixels is decoded at one eighth of its sides, and taken."""
    photograph = encoded(Image.new("L", (12_000, 9_000), 77), "JPEG")
    np.testing.assert_array_equal(decode_image(photograph, SPEC), plain((77, 77, 77)))
    assert decode_image(photograph, SPEC, max_pixels=1500 * 1125).shape == (3, 32, 32)
    with pytest.raises(ImageTooLarge, match=r"12000 x 9000 = 108,000,000 pixels \(1,687,500 at the scale"):
        decode_image(photograph, SPEC, max_pixels=1500 * 1125 - 1)


@pytest.mark.parametrize(("subsampling", "bytes_per_pixel"), [("4:2:0", 3), ("4:4:4", 6)])
def test_a_progressive_jpeg_takes_memory_for_its_coefficients(subsampling: str, bytes_per_pixel: int) -> None:
    """They are held at full size, two bytes each, whatever the scale that the pixels are decoded at."""
    photograph = encoded(photo(1600, 1200), "JPEG", progressive=True, subsampling=subsampling)
    pixels = 200 * 150
    assert EncodedImage(photograph, SPEC, max_pixels=pixels).memory_bytes() == pytest.approx(
        1600 * 1200 * bytes_per_pixel + 12 * pixels + len(photograph), rel=0.01
    )


def test_a_progressive_jpeg_without_sampling_factors_is_invalid() -> None:
    """Zeros there are damage like any other."""
    data = encoded(photo(100, 100).convert("L"), "JPEG", progressive=True)
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(data.replace(b"\x01\x01\x11\x00", b"\x01\x01\x00\x00", 1), SPEC)


@pytest.mark.slow
def test_a_progressive_jpeg_of_48_megapixels_is_taken() -> None:
    """Phones' photographs pass through tools that make them progressive."""
    photograph = encoded(Image.new("L", (8000, 6000), 77), "JPEG", progressive=True)
    np.testing.assert_array_equal(decode_image(photograph, SPEC), plain((77, 77, 77)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_reduced_scale_moves_nothing(options: dict[str, Any]) -> None:
    """Also where the sides are no multiples of the scale: what is decoded at the edge stands for more than there is."""
    picture = photo(967, 961)
    result = decode_image(encoded(picture, "JPEG", quality=100, subsampling=0, **options), SPEC)
    assert furthest(result, decode_image(encoded(picture), SPEC)) <= 1


@pytest.mark.parametrize(("size", "decoded"), [((239, 300), 239 * 300), ((240, 300), 120 * 150), ((4000, 60), 4000 * 60)])
def test_reduced_scale_never_goes_below_the_margin(size: tuple[int, int], decoded: int) -> None:
    """The shorter side keeps at least 120 pixels where it has them, so that resampling has detail to work on."""
    data = encoded(photo(*size), "JPEG")
    assert decode_image(data, SPEC, max_pixels=decoded).shape == (3, 32, 32)
    with pytest.raises(ImageTooLarge):
        decode_image(data, SPEC, max_pixels=decoded - 1)


@pytest.mark.parametrize(("size", "scale"), [((239, 300), 1), ((290, 241), 2), ((485, 483), 4), ((961, 1000), 8)])
def test_every_format_is_reduced_as_a_jpeg_is(size: tuple[int, int], scale: int) -> None:
    """By means of squares of pixels, to 120 at the least, so that a JPEG and the same pixels as PNG give the same input."""
    noise = np.random.default_rng(0).integers(60, 200, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
    data = encoded(Image.fromarray(noise).resize(size), "JPEG", quality=90, subsampling=0)
    with Image.open(BytesIO(data)) as whole:
        result = decode_image(encoded(whole), SPEC)
        width, height = size[0] / scale, size[1] / scale
        left, top, side = max(0, width - height) / 2, max(0, height - width) / 2, min(width, height)
        box = (left, top, left + side, top + side)
        expected = pixels_of(whole.reduce(scale).resize((32, 32), Image.Resampling.BILINEAR, box=box))
    np.testing.assert_array_equal(result, expected)
    assert furthest(decode_image(data, SPEC), result) <= (scale > 1)


def test_a_60_megapixel_png_is_refused_from_its_header() -> None:
    """200 kB that would unpack to 180 MB are refused, and the header alone is enough to know."""
    data = large_png(10_000, 6_000)
    assert 150_000 < len(data) < 250_000
    for part in (data, data[:200]):
        with pytest.raises(ImageTooLarge, match=r"10000 x 6000 = 60,000,000 pixels and the limit is 40,000,000") as caught:
            decode_image(part, SPEC)
        assert (caught.value.status, caught.value.code) == (413, "image_too_large")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_pixel_limit_is_exact_for_every_format(kind: str) -> None:
    """One pixel more than ``max_pixels`` is refused, the limit itself is not."""
    data = encoded(photo(128, 64), kind)
    assert decode_image(data, InputSpec(size=64), max_pixels=8192).shape == (3, 64, 64)
    with pytest.raises(ImageTooLarge, match="128 x 64 = 8,192 pixels"):
        decode_image(data, InputSpec(size=64), max_pixels=8191)


@pytest.mark.parametrize("chunk", ["VP8 ", "VP8L", "VP8X"])
def test_a_webp_is_refused_before_its_canvas_is_allocated(chunk: str) -> None:
    """Each of the three kinds of WebP (RFC 9649) has its size read from the first 30 bytes, and is refused by it."""
    exif = Image.Exif()
    exif[0x0112] = 1
    options: dict[str, dict[str, Any]] = {"VP8 ": {"quality": 50}, "VP8L": {"lossless": True}, "VP8X": {"exif": exif}}
    head = encoded(photo(50, 40), "WebP", **options[chunk])[:30]
    assert head[12:16] == chunk.encode()
    with pytest.raises(ImageTooLarge, match="50 x 40 = 2,000 pixels"):
        decode_image(head, SPEC, max_pixels=1999)
    with pytest.raises(InvalidImage):
        decode_image(head, SPEC, max_pixels=2000)


def test_a_gif_frame_larger_than_its_screen_counts() -> None:
    """The limit holds for what is decoded, not for what the first header field claims."""
    data = bytearray(encoded(photo(60, 50), "GIF"))
    data[6:10] = struct.pack("<HH", 4, 4)
    with pytest.raises(ImageTooLarge, match="60 x 50"):
        decode_image(bytes(data), SPEC, max_pixels=2999)


# Bad images


@pytest.mark.parametrize("data", [b"", memoryview(b"")])
def test_an_empty_image_is_invalid(data: bytes | memoryview) -> None:
    """Nothing at all is told apart from damage."""
    with pytest.raises(InvalidImage, match="the image is empty"):
        decode_image(data, SPEC)


@pytest.mark.parametrize("data", [b"hello, world", b"\0" * 1000, b'{"inputs": 1}', b"\xff", b"RIFF\0\0\0\0WAVEfmt "])
def test_what_is_no_image_is_invalid(data: bytes) -> None:
    """Text, zeros and sound are refused with the list of formats that would be taken."""
    with pytest.raises(InvalidImage, match="not an image of a known format; send JPEG, PNG, WebP, AVIF, HEIC, GIF or BMP"):
        decode_image(data, SPEC)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "JPEG2000"])
def test_formats_that_are_not_listed_are_unsupported(kind: str) -> None:
    """A sound image in another format is 415, though Pillow could read it."""
    try:
        data = encoded(small_photo(), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(UnsupportedMediaType, match="not supported; send JPEG, PNG, WebP, AVIF, HEIC, GIF or BMP") as caught:
        decode_image(data, SPEC)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    "head",
    [b"MM\0*", b"8BPS", b"\xff\x4f\xff\x51", b"\xff\x0a", b"%PDF-1.7", b"<svg xmlns=", b"<?xml version=", b"qoif"],
)
def test_foreign_formats_are_named(head: bytes) -> None:
    """A known foreign format is told from noise by its first bytes, so that the client learns what to change."""
    with pytest.raises(UnsupportedMediaType):
        decode_image(head + bytes(100), SPEC)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_invalid(kind: str, share: float) -> None:
    """An upload cut short is never classified by the part that arrived."""
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)), kind)
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(data[: int(len(data) * share)], SPEC)


def test_a_damaged_png_is_invalid() -> None:
    """A flipped bit in the pixels of a PNG is noticed by its checksums."""
    data = bytearray(encoded(photo()))
    data[len(data) // 2] ^= 1
    with pytest.raises(InvalidImage, match="damaged or cut short"):
        decode_image(bytes(data), SPEC)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_invalid(size: tuple[int, int]) -> None:
    """A header that says zero pixels is no image."""
    body = png_chunk(b"IDAT", zlib.compress(b"\0" * 20)) + png_chunk(b"IEND", b"")
    with pytest.raises(InvalidImage):
        decode_image(png_header(*size) + body, SPEC)


@pytest.mark.parametrize("kind", FORMATS)
def test_details_hold_nothing_internal(kind: str) -> None:
    """What a client reads about a damaged image holds no path, no class name and no library's message."""
    with pytest.raises(InvalidImage) as caught:
        decode_image(encoded(photo(), kind)[:100], SPEC)
    for word in ("PIL", "Error", "Traceback", "/", "BytesIO", "cannot identify"):
        assert word not in caught.value.detail


FILES = [encoded(photo(40, 30), kind) for kind in FORMATS] + [encoded(photo(40, 30).convert("CMYK"), "JPEG")]


@given(data=st.binary(max_size=300))
def test_noise_gives_typed_errors_only(data: bytes) -> None:
    """Whatever the bytes are, the caller has nothing to catch but errors of the service's own."""
    with pytest.raises(ServiceError):
        decode_image(data, SPEC)


@given(data=st.data())
def test_damaged_files_give_an_array_or_a_typed_error(data: st.DataObject) -> None:
    """Overwriting and cutting sound files at random never ends in a foreign exception or an array of another shape."""
    file = bytearray(data.draw(st.sampled_from(FILES), label="file"))
    for _ in range(data.draw(st.integers(0, 8), label="changes")):
        file[data.draw(st.integers(0, len(file) - 1), label="at")] = data.draw(st.integers(0, 255), label="byte")
    cut = data.draw(st.integers(1, len(file)), label="cut at")
    try:
        result = decode_image(bytes(file[:cut]), SPEC, max_pixels=100_000)
    except ServiceError:
        return
    assert result.shape == (3, 32, 32)
    assert result.dtype == np.uint8


# Where to decode, and that all decode alike


def test_images_that_decode_quickly_are_told_from_others() -> None:
    """Only an image that is small in bytes and in pixels, at the scale it is decoded at, is decoded where it arrives."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).resize((640, 480))
    assert EncodedImage(encoded(small_photo()), SPEC).is_quick()
    assert EncodedImage(encoded(photo, "JPEG"), SPEC).is_quick()
    assert not EncodedImage(encoded(photo, "JPEG"), InputSpec(size=224)).is_quick()
    assert not EncodedImage(encoded(photo, "JPEG", progressive=True), SPEC).is_quick()
    many_pixels = encoded(Image.new("L", (QUICK_PIXELS // 128, 129)))
    assert len(many_pixels) < QUICK_BYTES
    assert not EncodedImage(many_pixels, SPEC).is_quick()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (250, 250, 3), np.uint8))
    assert len(encoded(noise)) > QUICK_BYTES
    assert not EncodedImage(encoded(noise), SPEC).is_quick()
    many_bytes = encoded(noise, "JPEG", quality=100, subsampling=0)
    assert len(many_bytes) > QUICK_JPEG_BYTES
    assert not EncodedImage(many_bytes, SPEC).is_quick()


def mixed_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a-turned.jpg": encoded(photo(640, 480), "JPEG", exif=exif),
        "b-cmyk.jpg": encoded(photo(300, 200).convert("CMYK"), "JPEG"),
        "c-alpha.png": encoded(photo(90, 70).convert("RGBA")),
        "d-palette.gif": encoded(photo(60, 60), "GIF"),
        "e-plain.png": encoded(small_photo()),
        "f-lossy.webp": encoded(photo(150, 300), "WebP"),
        "g-deep.png": encoded(Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)),
        "h-plain.bmp": encoded(photo(33, 32), "BMP"),
    }


def test_training_and_serving_decode_identically(tmp_path: Path) -> None:
    """One file is the identical tensor in the training set and in a request, whatever its format, mode and size."""
    files = mixed_files()
    for class_name in ("first", "second"):
        (tmp_path / class_name).mkdir()
        for name, data in files.items():
            (tmp_path / class_name / name).write_bytes(data)

    async def serve() -> list[NDArray[np.uint8]]:
        decoder = Decoder(threads=1, max_waiting=3, memory=MemoryBudget(2**30))
        try:
            return [await decoder.decode_large(EncodedImage(data, SPEC), time.monotonic() + 60) for data in files.values()]
        finally:
            decoder.close()

    served = torch.from_numpy(np.stack(asyncio.run(serve())))
    trained = load_folder(tmp_path, SPEC)
    assert torch.equal(trained.images[trained.labels == 0], served)
    assert torch.equal(trained.images[trained.labels == 1], served)


# Bounds on work: what is not needed for pixels never reaches a decoder


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(body)) + body


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def with_many_segments(kind: str, size: int) -> bytes:
    """A sound file with about ``size`` bytes of the smallest segments that its format has, before its pixels."""
    data = encoded(photo(300, 300), kind)
    match kind:
        case "JPEG":
            return data[:2] + jpeg_segment(0xE1, b"Exif\0\0") * (size // 10) + data[2:]
        case "PNG":
            return data[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 9999)) * (size // 50) + data[33:]
        case "GIF":
            return data[:781] + b"!\xfe" + b"\1a" * (size // 2) + b"\0" + data[781:]
        case _:
            body = data[12:] + b"JUNK\0\0\0\0" * (size // 8)
            return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "GIF"])
def test_metadata_of_any_usual_size_is_passed_over(kind: str) -> None:
    """A few thousand segments that say nothing of pixels change none."""
    np.testing.assert_array_equal(
        decode_image(with_many_segments(kind, 18_000), SPEC), decode_image(encoded(photo(300, 300), kind), SPEC)
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "GIF"])
def test_a_body_full_of_segments_is_refused(kind: str) -> None:
    """Sixteen megabytes of them are refused after the first ten thousand."""
    with pytest.raises(InvalidImage, match="cost too much to decode: it has too many segments"):
        EncodedImage(with_many_segments(kind, 16_000_000), SPEC)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"no keyword"),
        png_chunk(b"zTXt", b"a\0\0not compressed"),
        png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(70_000_000))),
        png_chunk(b"tEXt", b"a\0b")[:-1] + b"?",
        png_chunk(b"tRNS", b"?"),
        png_chunk(b"eXIf", b"?"),
        png_chunk(b"acTL", b""),
    ],
    ids=["text", "compressed text", "large profile", "checksum", "transparency", "exif", "animation"],
)
def test_damaged_or_large_metadata_of_a_png_is_passed_over(chunk: bytes) -> None:
    """Every viewer shows these pixels, and so does this."""
    data = encoded(small_photo())
    np.testing.assert_array_equal(decode_image(data[:33] + chunk + data[33:], SPEC), pixels_of(small_photo()))


@pytest.mark.parametrize("second", [exif_of(6)[6:], b"II*\0\x08\0\0\0" + struct.pack("<H", 1000) + bytes(12_000)])
def test_of_several_exif_chunks_the_first_counts(second: bytes) -> None:
    """Only one is read: each may have a thousand entries, and 16 MB of them would keep the event loop for a second."""
    data = encoded(photo(160, 96))
    exif = png_chunk(b"eXIf", exif_of(3)[6:])
    several = data[:33] + exif + png_chunk(b"eXIf", second) * 100 + data[33:]
    np.testing.assert_array_equal(decode_image(several, SPEC), decode_image(data[:33] + exif + data[33:], SPEC))


def test_xmp_does_not_turn_an_avif() -> None:
    """Its orientation is a property of the picture: what Exif and XMP say beside it never reaches the decoder."""
    data = encoded(photo(160, 96), "AVIF", xmp=b'<x:xmpmeta tiff:Orientation="6"/>', quality=95)
    np.testing.assert_array_equal(decode_image(data, SPEC), decode_image(encoded(photo(160, 96), "AVIF", quality=95), SPEC))


@pytest.mark.parametrize(("bits", "value"), [(2, 2), (4, 9), (16, 30_000)])
def test_a_transparent_grey_value_of_any_depth_is_white(bits: int, value: int) -> None:
    """Pixels of exactly that value are transparent, a neighbour's are not."""
    samples = np.full((32, 32), value, np.uint16)
    samples[:, 16:] = value - 1
    digits = ((samples[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
    data = png_header(32, 32, bits=bits, colour_type=0) + png_chunk(b"tRNS", struct.pack(">H", value))
    result = decode_image(data + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""), SPEC)
    neighbour = (value - 1) >> 8 if bits == 16 else (value - 1) * 255 // (2**bits - 1)
    np.testing.assert_array_equal(result[:, :, :16], plain(WHITE)[:, :, :16])
    np.testing.assert_array_equal(result[:, :, 16:], plain((neighbour, neighbour, neighbour))[:, :, 16:])


def scans_of(data: bytes, count: int) -> bytes:
    """A progressive file whose last scan is there ``count`` times."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """An encoder writes ten; each costs a pass over all pixels."""
    progressive = encoded(photo(400, 300), "JPEG", progressive=True)
    with pytest.raises(InvalidImage, match="cost too much to decode"):
        decode_image(scans_of(progressive, 500), SPEC)
    large = progressive.replace(struct.pack(">HH", 300, 400), struct.pack(">HH", 16_000, 16_000), 1)
    with pytest.raises(InvalidImage, match="cost too much to decode"):
        decode_image(scans_of(large, 5), SPEC)


def test_decoding_ends_at_the_deadline() -> None:
    """Also in the middle of an image, for each format that is read piece by piece."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8))
    for kind, options in (("JPEG", {"progressive": True}), ("PNG", {"compress_level": 1}), ("GIF", {})):
        image = EncodedImage(encoded(noise, kind, **options), SPEC)
        with pytest.raises(DeadlineExceeded):
            image.decode(time.monotonic() + 0.01)
    short_scans = scans_of(encoded(Image.new("L", (2000, 2000)), "JPEG", progressive=True), 80)
    with pytest.raises(DeadlineExceeded):
        EncodedImage(short_scans, SPEC).decode(time.monotonic() + 0.02)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_what_is_decoded_in_one_piece_begins_only_where_it_can_end_in_time(kind: str) -> None:
    """Nothing ends such a decoder, so an image whose pixels take longer than the deadline leaves is refused before."""
    data = encoded(photo(2000, 1500), kind, **({"method": 0} if kind == "WEBP" else {"speed": 10}))
    with pytest.raises(DeadlineExceeded):
        EncodedImage(data, SPEC).decode(time.monotonic() + 0.05)
    assert EncodedImage(data, SPEC).decode(time.monotonic() + 600).shape == (3, 32, 32)


def test_run_lengths_are_bounded_by_the_bytes_of_the_file() -> None:
    """Two megabytes of a BMP's runs would keep Python busy for seconds."""
    head = b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54 + 1024, 40, 4000, 4000, 1, 8, 1) + bytes(20) + bytes(1024)
    with pytest.raises(InvalidImage, match="cost too much to decode"):
        decode_image(head + b"\1\0" * 2**20, SPEC)


def test_short_memory_is_not_damage() -> None:
    """An image that does not fit into memory is refused for now."""
    script = """
import resource
from service.errors import MemoryBudgetExceeded
from service.model.images import InputSpec, decode_image
from tests.model.test_images import large_png
data = large_png(6000, 6000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, used + 60_000_000))
try:
    decode_image(data, InputSpec())
except MemoryBudgetExceeded as error:
    print(error.status, error.code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "503 memory_budget_exceeded\n", done.stderr


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xef\xbb\xbf \n<!-- made by hand --><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'><svg/>", "SVG"),
        (b"<!--" + b"a" * 3000 + b"--><svg/>", "SVG"),
        (b"\x8aMNG\r\n\x1a\n", "MNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"II+\0\x08\0\0\0", "TIFF"),
        (b"\0\0\0\x18ftypqt  " + bytes(16), "video"),
        (b"\0\0\0\x18ftypmp42" + bytes(16), "video"),
        (b"\x1a\x45\xdf\xa3" + bytes(40), "video"),
    ],
)
def test_what_is_not_accepted_is_named(data: bytes, name: str) -> None:
    """The client learns what it sent."""
    with pytest.raises(UnsupportedMediaType, match=f"^{name} files are not supported"):
        decode_image(data, SPEC)
