"""``POST /view`` and ``POST /explain`` over a real socket."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint
from service.model.class_activation import ClassActivation
from service.model.images import decode_image
from tests.support.scripted_engine import ApplicationServer


def upload(path: Path) -> dict[str, tuple[str, bytes]]:
    """Give the form's one file."""
    return {"file": (path.name, path.read_bytes())}


def test_view_is_what_the_network_sees(service: ServiceProcess, checkpoint: Checkpoint) -> None:
    """The PNG holds the very pixels that the decoder makes of a photo for the network."""
    pixels = np.random.default_rng(0).integers(0, 256, (75, 120, 3), np.uint8)
    photo = BytesIO()
    Image.fromarray(pixels).save(photo, "JPEG")
    answer = httpx.post(f"{service.url}/view", content=photo.getvalue(), headers={"Content-Type": "image/jpeg"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/png"
    seen = np.asarray(Image.open(BytesIO(answer.content))).transpose(2, 0, 1)
    np.testing.assert_array_equal(seen, decode_image(photo.getvalue(), checkpoint.metadata.input))


def test_view_of_a_view_is_itself(service: ServiceProcess, image_paths: list[Path]) -> None:
    """What the network sees can be sent in the image's place: it comes out unchanged."""
    first = httpx.post(f"{service.url}/view", files=upload(image_paths[0])).content
    again = httpx.post(f"{service.url}/view", content=first, headers={"Content-Type": "image/png"}).content
    assert first == again


def test_explain_gives_the_heatmap(service: ServiceProcess, checkpoint: Checkpoint, image_paths: list[Path]) -> None:
    """The heatmap is the class activation map of the class that was asked for, with the model that made it."""
    answer = httpx.post(f"{service.url}/explain", params={"label": "dog"}, files=upload(image_paths[0])).json()
    label = checkpoint.metadata.class_names.index("dog")
    pixels = decode_image(image_paths[0].read_bytes(), checkpoint.metadata.input)
    np.testing.assert_allclose(answer.pop("heatmap"), ClassActivation(checkpoint).heatmap(pixels, label)[1], atol=1e-3)
    model = {"name": checkpoint.metadata.name, "version": checkpoint.version}
    assert answer == {"label": "dog", "filename": image_paths[0].name, "model": model}


@pytest.mark.slow
def test_explain_on_the_torch_runtime(checkpoint_path: Path, service: ServiceProcess, image_paths: list[Path]) -> None:
    """The heatmap is the same one whatever runtime predicts."""
    with ServiceProcess(checkpoint_path, runtime="torch", device="cpu") as on_torch:
        assert httpx.get(f"{on_torch.url}/health").json()["runtime"].startswith("torch")
        answers = [
            httpx.post(f"{running.url}/explain", params={"label": "ship"}, files=upload(image_paths[-1])).json()
            for running in (on_torch, service)
        ]
    assert answers[0] == answers[1]


def test_explain_takes_the_likeliest_class(service: ServiceProcess, image_paths: list[Path]) -> None:
    """Without a label, the class that is explained is the one that is predicted."""
    for path in image_paths[::10]:
        predicted = httpx.post(f"{service.url}/predict", files=upload(path)).json()["label"]
        assert httpx.post(f"{service.url}/explain", files=upload(path)).json()["label"] == predicted


def test_explain_takes_base64_too(service: ServiceProcess, image_paths: list[Path]) -> None:
    """An image in JSON is explained as the same image in a form."""
    body = {"inputs": base64.b64encode(image_paths[0].read_bytes()).decode()}
    in_json = httpx.post(f"{service.url}/explain", json=body).json()
    in_form = httpx.post(f"{service.url}/explain", files=upload(image_paths[0])).json()
    assert in_json["heatmap"] == in_form["heatmap"]


@pytest.mark.parametrize(
    ("path", "options", "status", "code"),
    [
        ("/explain?label=zebra", {"files": {"file": b"\x89PNG"}}, 422, "invalid_parameter"),
        ("/explain", {"files": {"file": b"no image"}}, 422, "invalid_image"),
        ("/explain", {"files": {"image": b"x"}}, 422, "missing_file"),
        ("/explain", {"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type"),
        ("/explain", {"json": {"inputs": "https://example.com/cat.png"}}, 400, "malformed_request"),
        ("/view", {"files": {"file": b""}}, 422, "invalid_image"),
        ("/view", {"files": {"file": b"%PDF-1.7"}}, 415, "unsupported_media_type"),
    ],
)
def test_refusals(service: ServiceProcess, path: str, options: dict[str, object], status: int, code: str) -> None:
    """Both routes refuse what ``/predict`` refuses, and a label that the model does not have."""
    answer = httpx.post(service.url + path, **options)  # type: ignore[arg-type]  # httpx's own keywords
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == code


def test_an_engine_without_a_model_yet() -> None:
    """Before there is a model, both routes answer that the service is not ready."""
    with ApplicationServer() as server:
        server.engine.model = None
        for path in ("/view", "/explain"):
            answer = httpx.post(server.url + path, files={"file": b"x"})
            assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
