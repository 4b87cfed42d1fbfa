"""Predictions over real sockets, from a user's side: what goes in, what comes out, and that nothing odd does harm."""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint
from service.model.images import decode_image
from service.runtime.open_runner import open_runner
from service.runtime.runner import RunnerOptions
from tests.support.image_file import encoded
from tests.support.patience import wait_until
from tests.support.seed_images import SAVED, saved
from training.data.folder import load_folder


@pytest.fixture(scope="module")
def client(service: ServiceProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def photo(size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A smooth colour picture that every format keeps nearly as it is."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) * 255 // sum(size)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def label_of(path: Path) -> str:
    return path.name.split("-")[0]


def shifted_images(paths: list[Path], count: int) -> list[bytes]:
    """``count`` different PNG and JPEG files from the sample images: shifted, flipped, brighter and darker."""
    rng = np.random.default_rng(0)
    files = []
    for index in range(count):
        with Image.open(paths[index % len(paths)]) as image:
            pixels = np.asarray(image.convert("RGB"))
        pixels = np.roll(pixels, rng.integers(-3, 4, 2), (0, 1))[:, :: rng.choice([-1, 1])]
        pixels = np.clip(pixels * rng.uniform(0.8, 1.2), 0, 255).astype(np.uint8)
        files.append(encoded(Image.fromarray(pixels), "JPEG" if index % 2 else "PNG"))
    return files


@pytest.fixture(scope="module")
def thousand_files(image_paths: list[Path]) -> list[bytes]:
    return shifted_images(image_paths, 1000)


@pytest.fixture(scope="module")
def offline_labels(thousand_files: list[bytes], checkpoint: Checkpoint) -> list[str]:
    """The labels of the same files from the checkpoint itself, image by image, without any service."""
    spec, names = checkpoint.metadata.input, checkpoint.metadata.class_names
    runner = open_runner(checkpoint, RunnerOptions())
    try:
        return [names[int(runner.run(decode_image(data, spec)[None]).argmax())] for data in thousand_files]
    finally:
        runner.close()


def test_every_sample_gets_its_class(client: httpx.Client, image_paths: list[Path]) -> None:
    """The main job: an image file in, the right label out; the network knows at least 9 of 10 of the samples."""
    right = 0
    for path in image_paths:
        answer = client.post("/predict", files={"file": (path.name, path.read_bytes(), "image/png")}).json()
        right += answer["label"] == label_of(path)
    assert right >= 0.9 * len(image_paths)


def test_the_answer_has_the_contracts_shape(client: httpx.Client, image_paths: list[Path], checkpoint: Checkpoint) -> None:
    """Label, score, five predictions in descending order, the file's name, the model and the timing headers."""
    path = image_paths[0]
    response = client.post("/predict", files={"file": ("my cat é.png", path.read_bytes())}, headers={"X-Request-ID": "abc-1"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == ["label", "score", "predictions", "known", "typicality", "filename", "model"]
    assert len(answer["predictions"]) == 5
    assert answer["predictions"][0] == {"label": answer["label"], "score": answer["score"]}
    scores = [entry["score"] for entry in answer["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["filename"] == "my cat é.png"
    assert answer["model"] == {"name": "resnet18-cifar10", "version": checkpoint.version}
    assert response.headers["x-request-id"] == "abc-1"
    assert re.fullmatch(r"decode;dur=[\d.]+, queue;dur=[\d.]+, compute;dur=[\d.]+", response.headers["server-timing"])
    assert int(response.headers["x-batch-size"]) >= 1


def test_all_scores_sum_to_one(client: httpx.Client, image_paths: list[Path], checkpoint: Checkpoint) -> None:
    """``top_k`` of all classes gives a distribution over every label, each once."""
    names = checkpoint.metadata.class_names
    answer = client.post(f"/predict?top_k={len(names)}", files={"file": image_paths[5].read_bytes()}).json()
    assert sum(entry["score"] for entry in answer["predictions"]) == pytest.approx(1.0, abs=1e-4)
    assert sorted(entry["label"] for entry in answer["predictions"]) == sorted(names)


def test_one_answer_whichever_way_the_image_comes(client: httpx.Client, image_paths: list[Path]) -> None:
    """Form, raw body, octets, base64 and a data: URI differ in nothing but the file's name."""
    data = image_paths[7].read_bytes()
    text = base64.b64encode(data).decode()
    answers = [
        client.post("/predict?top_k=3", files={"file": data}),
        client.post("/predict?top_k=3", content=data, headers={"Content-Type": "image/png"}),
        client.post("/predict?top_k=3", content=data, headers={"Content-Type": "application/octet-stream"}),
        client.post("/predict", json={"inputs": text, "parameters": {"top_k": 3}}),
        client.post("/predict?top_k=3", json={"inputs": f"data:image/png;base64,{text}"}),
    ]
    assert [response.status_code for response in answers] == [200] * len(answers)
    predictions = [response.json()["predictions"] for response in answers]
    assert len(predictions[0]) == 3
    assert all(other == predictions[0] for other in predictions)


def test_a_thousand_images_one_by_one_equal_offline_evaluation(
    client: httpx.Client, thousand_files: list[bytes], offline_labels: list[str]
) -> None:
    """Over HTTP one at a time, every label is the one that the checkpoint gives offline."""
    online = [
        client.post("/predict", content=data, headers={"Content-Type": "image/*"}).json()["label"] for data in thousand_files
    ]
    assert online == offline_labels


def test_a_thousand_images_in_batches_equal_offline_evaluation(
    client: httpx.Client, thousand_files: list[bytes], offline_labels: list[str]
) -> None:
    """64 at a time, in one request each, the labels are the same again and in the order sent."""
    online: list[str] = []
    for start in range(0, len(thousand_files), 64):
        files = [("file", (f"{start + at}", data)) for at, data in enumerate(thousand_files[start : start + 64])]
        results = client.post("/predict/batch", files=files).json()["results"]
        assert [result["filename"] for result in results] == [name for _, (name, _) in files]
        online += [result["label"] for result in results]
    assert online == offline_labels


def test_one_bad_file_in_a_batch_harms_no_other(client: httpx.Client, image_paths: list[Path]) -> None:
    """A broken file among good ones is an entry with its own error; the rest is answered."""
    good = image_paths[0].read_bytes()
    files = [("file", ("a", good)), ("file", ("b", b"no image")), ("file", ("c", good[:100])), ("file", ("d", good))]
    response = client.post("/predict/batch", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["filename"] for result in results] == ["a", "b", "c", "d"]
    assert results[0]["label"] == results[3]["label"]
    for bad in results[1:3]:
        assert bad["error"]["status"] == 422
        assert bad["error"]["code"] == "invalid_image"
        assert bad["error"]["detail"]


def test_a_batch_of_many_large_images_is_answered_whole(client: httpx.Client) -> None:
    """More large images than may wait for the decoding threads at once: none is refused for its company."""
    data = encoded(photo((640, 480)), "JPEG")
    results = client.post("/predict/batch", files=[("file", (f"{index}", data)) for index in range(150)]).json()["results"]
    assert len(results) == 150
    assert all("label" in result for result in results)


ODD_IMAGES = {
    "12-megapixel JPEG": lambda: encoded(photo((4000, 3000)), "JPEG"),
    "1x1": lambda: encoded(Image.new("RGB", (1, 1), (200, 30, 30))),
    "CMYK": lambda: encoded(photo().convert("CMYK"), "JPEG"),
    "16-bit grey": lambda: encoded(Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64))),
    "grey": lambda: encoded(photo().convert("L"), "JPEG"),
    "grey with alpha": lambda: encoded(photo().convert("LA")),
    "one bit": lambda: encoded(photo().convert("1")),
    "palette": lambda: encoded(photo().convert("P")),
    "palette with transparency": lambda: encoded(photo().convert("P"), transparency=0),
    "alpha": lambda: encoded(photo().convert("RGBA")),
    "animated GIF": lambda: encoded(photo(), "GIF", save_all=True, append_images=[photo((320, 240)).rotate(90)] * 3),
    "WebP": lambda: encoded(photo(), "WEBP"),
    "BMP": lambda: encoded(photo(), "BMP"),
    "progressive JPEG": lambda: encoded(photo(), "JPEG", progressive=True),
    "very wide": lambda: encoded(photo((4000, 2))),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_are_answered(client: httpx.Client, kind: str) -> None:
    """Every mode, format and size that the contract lists gets a prediction with finite scores."""
    response = client.post("/predict?top_k=10", files={"file": ODD_IMAGES[kind]()})
    assert response.status_code == 200, response.text
    assert sum(entry["score"] for entry in response.json()["predictions"]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode", "options"), SAVED)
def test_every_format_gets_what_its_twin_as_a_plain_png_gets(
    client: httpx.Client, image_paths: list[Path], kind: str, mode: str, options: dict[str, Any]
) -> None:
    """The same label and nearly the same score, of a small picture and of a large one."""
    for path in image_paths[::16]:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
        for picture in (small, small.resize((640, 480), Image.Resampling.BICUBIC)):
            data = saved(picture, kind, mode, options)
            given, twin = (client.post("/predict", files={"file": file}).json() for file in (data, plain_twin(data)))
            assert given["label"] == twin["label"]
            assert given["score"] == pytest.approx(twin["score"], abs=0.1 if kind == "JPEG" else 0.05)


def plain_twin(data: bytes) -> bytes:
    """The same picture upright, in 8 bits, on white, as Pillow sees it."""
    with Image.open(BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return encoded(white.convert("RGB"))


def test_an_image_turned_by_exif_is_predicted_upright(client: httpx.Client, image_paths: list[Path]) -> None:
    """A picture stored on its side with an orientation tag gets the scores of the upright picture."""
    with Image.open(image_paths[9]) as opened:
        image = opened.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    sideways = client.post("/predict", files={"file": encoded(turned, "PNG", exif=exif)}).json()
    upright = client.post("/predict", files={"file": encoded(image, "PNG")}).json()
    assert sideways["predictions"] == upright["predictions"]


def test_a_body_sent_one_byte_at_a_time_is_answered(service: ServiceProcess, image_paths: list[Path]) -> None:
    """However a request is cut into packets, its answer is the same."""
    data = image_paths[3].read_bytes()
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nConnection: close\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with service.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head.encode() + data:
            sock.sendall(bytes([byte]))
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["label"]


def test_a_client_that_leaves_in_the_middle_harms_nobody(
    service: ServiceProcess, client: httpx.Client, image_paths: list[Path]
) -> None:
    """Half a body and a hang-up, a whole body and a hang-up: the next request is answered and nothing stays queued."""
    data = image_paths[3].read_bytes()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    for sent in (head[:20], head, head + data[:50], head + data):
        for _ in range(20):
            with service.connect() as sock:
                sock.sendall(sent)
    assert client.post("/predict", files={"file": data}).status_code == 200
    wait_until(lambda: client.get("/health").json()["queue_depth"] == 0)
    assert "Traceback" not in service.output


def test_pipelined_and_kept_alive_requests_are_answered_in_order(service: ServiceProcess, image_paths: list[Path]) -> None:
    """Several requests in one packet on one connection get as many answers, in order."""
    data = image_paths[3].read_bytes()
    requests = b""
    for index in range(3):
        close = "Connection: close\r\n" if index == 2 else ""
        requests += (
            f"POST /predict HTTP/1.1\r\nHost: x\r\nX-Request-ID: r{index}\r\nContent-Type: image/png\r\n{close}"
            f"Content-Length: {len(data)}\r\n\r\n"
        ).encode() + data
    with service.connect() as sock:
        sock.sendall(requests)
        answer = read_all(sock)
    assert re.findall(rb"x-request-id: (r\d)", answer) == [b"r0", b"r1", b"r2"]
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_openapi_describes_every_route_body_and_error(client: httpx.Client) -> None:
    """The schema names the bodies of /predict, the batch form, and every status of the error table."""
    schema = client.get("/openapi.json").json()
    predict = schema["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/octet-stream",
        "application/json",
    }
    assert {"200", "400", "401", "413", "415", "422", "429", "500", "503", "504"} <= set(predict["responses"])
    for path in ("/predict/batch", "/labels", "/health", "/health/ready", "/health/live"):
        assert path in schema["paths"]
    assert client.get("/docs").status_code == 200


def read_all(sock: socket.socket) -> bytes:
    chunks = []
    while chunk := sock.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


def test_training_and_serving_see_the_same_pixels(
    tmp_path: Path, image_paths: list[Path], sample_images: NDArray[np.uint8], checkpoint: Checkpoint
) -> None:
    """A training set made of files holds, bit by bit, what the service hands to the network for the same files."""
    for path in image_paths:
        folder = tmp_path / label_of(path)
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    dataset = load_folder(tmp_path, checkpoint.metadata.input)
    assert np.array_equal(dataset.images.numpy(), sample_images)
