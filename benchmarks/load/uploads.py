"""The images that benchmarks upload, and the HTTP requests that carry them, as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# The sample images of the repository, CIFAR-10 test images named <class>-<number>.png.
SAMPLES = sorted((Path(__file__).parents[2] / "tests" / "images").glob("*.png"))
_BOUNDARY = "------------------------d74496d66958873e"
FORM_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"


def small_jpegs() -> list[bytes]:
    """The sample images as JPEGs of 32x32 pixels and about 1 kB."""
    return [_as_jpeg(_load(path)) for path in SAMPLES]


def photo() -> bytes:
    """A JPEG of 640x480 pixels and about 60 kB, as a web page shows it."""
    return _photo(640, 480, noise=9)


def large_photo() -> bytes:
    """A JPEG of 12 megapixels and about 1 MB, as a telephone's camera makes it."""
    return _photo(4000, 3000, noise=4)


# What ``--upload`` names.
UPLOADS: dict[str, Callable[[], list[bytes]]] = {
    "small": small_jpegs,
    "photo": lambda: [photo()],
    "large": lambda: [large_photo()],
}


def http_request(
    method: str, path: str, body: bytes = b"", content_type: str = "", headers: dict[str, str] | None = None
) -> bytes:
    """A whole HTTP/1.1 request with ``Content-Length``."""
    lines = {"Host": "localhost", "Content-Length": str(len(body)), **({"Content-Type": content_type} if content_type else {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in (lines | (headers or {})).items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def form(*files: bytes) -> bytes:
    """A body of type ``FORM_TYPE`` with each file as a part named ``file``, as curl sends it."""
    head = 'Content-Disposition: form-data; name="file"; filename="image.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    parts = b"".join(f"--{_BOUNDARY}\r\n{head}".encode() + file + b"\r\n" for file in files)
    return parts + f"--{_BOUNDARY}--\r\n".encode()


def form_request(path: str, *images: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A POST of images in one multipart form."""
    return http_request("POST", path, form(*images), FORM_TYPE, headers)


def raw_request(path: str, image: bytes, *, headers: dict[str, str] | None = None) -> bytes:
    """A POST whose body is the image."""
    return http_request("POST", path, image, "image/jpeg", headers)


def pixels_request(model: str, count: int) -> bytes:
    """A POST of ``count`` random images, uint8 (count, 3, 32, 32), to the model of that name at /v2."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8)
    size = {"binary_data_size": pixels.nbytes}
    inputs = [{"name": "pixels", "shape": pixels.shape, "datatype": "UINT8", "parameters": size}]
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return http_request("POST", f"/v2/models/{model}/infer", head + pixels.tobytes(), "application/octet-stream", headers)


def parse_headers(lines: list[str]) -> dict[str, str]:
    """Headers from ``name: value`` lines."""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _photo(width: int, height: int, noise: int) -> bytes:
    """A sample image enlarged, with noise in place of the detail that it lacks."""
    pixels = np.asarray(_load(SAMPLES[0]).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = np.random.default_rng(0).integers(-noise, noise + 1, (height, width, 1), np.int16)
    return _as_jpeg(Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)))


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _as_jpeg(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
