"""``/v2`` with the stock ``tritonclient[http]``, unmodified, against the running service, and the refusals of what is wrong."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from benchmarks.servers.service_process import ServiceProcess
from service.engine.interface import ModelInfo, Prediction
from service.errors import Overloaded
from service.model.images import InputSpec
from tests.support.scripted_engine import MODEL as SCRIPTED_MODEL
from tests.support.scripted_engine import ApplicationServer, probabilities

MODEL = "resnet18-cifar10"


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[triton.InferenceServerClient]:
    """The stock client, connected to the running service."""
    with triton.InferenceServerClient(service.url.removeprefix("http://"), concurrency=4) as connected:
        yield connected


@pytest.fixture(scope="module")
def application() -> Iterator[ApplicationServer]:
    """The application over a scripted engine, with small limits."""
    settings: dict[str, Any] = {
        "max_images_per_request": 4,
        "max_body_bytes": 120_000,
        "max_image_pixels": 2_000,
        "max_batch_size": 2,
    }
    with ApplicationServer(**settings) as running:
        yield running


@pytest.fixture(scope="session")
def png() -> Callable[[int, int], bytes]:
    """A PNG of this width and height that does not compress, so that it is large in bytes as well."""

    def encode(width: int, height: int) -> bytes:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encode


@pytest.fixture
def encoded(image_paths: list[Path]) -> list[bytes]:
    """The sample images as they are in their files."""
    return [path.read_bytes() for path in image_paths]


@pytest.fixture
def expected(service: ServiceProcess, image_paths: list[Path]) -> list[dict[str, Any]]:
    """What ``/predict/batch`` answers for the sample images, with all classes."""
    files = [("file", (path.name, path.read_bytes())) for path in image_paths]
    results: list[dict[str, Any]] = httpx.post(f"{service.url}/predict/batch?top_k=10", files=files).json()["results"]
    return results


def image_input(images: list[bytes], *, binary: bool = True) -> triton.InferInput:
    """The input ``image``; in JSON its elements are in base64."""
    elements = images if binary else [base64.b64encode(image) for image in images]
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, np.object_), binary_data=binary)
    return tensor


def pixels_input(pixels: NDArray[np.uint8], *, binary: bool = True) -> triton.InferInput:
    """The input ``pixels``."""
    tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return tensor


def some_pixels(count: int = 1) -> NDArray[np.uint8]:
    """Pixels that are as good as any others."""
    return np.zeros((count, 3, 32, 32), np.uint8)


def output(**options: Any) -> list[triton.InferRequestedOutput]:
    """The only output, asked for with these options."""
    return [triton.InferRequestedOutput("probabilities", **options)]


def labels(result: triton.InferResult, names: tuple[str, ...]) -> list[str]:
    """The likeliest class of each image."""
    return [names[index] for index in result.as_numpy("probabilities").argmax(1)]


def class_names(service: ServiceProcess) -> tuple[str, ...]:
    """The classes in the order of the network's outputs."""
    return tuple(httpx.get(f"{service.url}/labels").json()["labels"])


# What the server and the model say of themselves


@pytest.mark.parametrize(("name", "version"), [("resnet50", ""), (MODEL, "1")])
def test_what_is_not_served_is_not_ready(client: triton.InferenceServerClient, name: str, version: str) -> None:
    """Another model, or another version, is not ready, and has no metadata, no configuration and no inference."""
    assert not client.is_model_ready(name, version)

    def infer(name: str, version: str) -> None:
        client.infer(name, [pixels_input(some_pixels())], version)

    for ask in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics, infer):
        with pytest.raises(InferenceServerException, match="there is no") as refusal:
            ask(name, version)
        assert refusal.value.status() == "404"


def test_the_server_names_its_extensions(client: triton.InferenceServerClient) -> None:
    """Clients look for an extension before they use it."""
    metadata = client.get_server_metadata()
    assert metadata["name"]
    assert metadata["version"]
    assert {"binary_tensor_data", "classification", "model_configuration", "statistics"} <= set(metadata["extensions"])


def test_metadata_and_configuration_agree_on_the_tensors(service: ServiceProcess, client: triton.InferenceServerClient) -> None:
    """Both describe two inputs of which one is sent, and the outputs, with and without a version in the path."""
    version = httpx.get(f"{service.url}/health").json()["model"]["version"]
    metadata = client.get_model_metadata(MODEL)
    assert metadata["name"] == MODEL
    assert metadata["versions"] == [version]
    assert metadata["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 32, 32]},
    ]
    assert metadata["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
        {"name": "typicality", "datatype": "FP32", "shape": [-1]},
    ]
    assert client.get_model_metadata(MODEL, version) == metadata

    config = client.get_model_config(MODEL)
    assert config["name"] == MODEL
    assert config["max_batch_size"] == 0  # so dims are whole shapes
    assert [(tensor["name"], tensor["data_type"], tensor["dims"], tensor["optional"]) for tensor in config["input"]] == [
        ("image", "TYPE_STRING", [-1], True),
        ("pixels", "TYPE_UINT8", [-1, 3, 32, 32], True),
    ]
    assert [(tensor["name"], tensor["data_type"], tensor["dims"]) for tensor in config["output"]] == [
        ("probabilities", "TYPE_FP32", [-1, 10]),
        ("typicality", "TYPE_FP32", [-1]),
    ]
    # Triton's perf_analyzer reads the version as a decimal number, and may ask by it.
    (entry,) = client.get_inference_statistics(MODEL, version)["model_stats"]
    assert int(entry["version"]) == int(version, 16)
    assert client.get_model_config(MODEL, version) == client.get_model_config(MODEL, entry["version"]) == config


def test_the_repository_holds_the_model(client: triton.InferenceServerClient) -> None:
    """The index lists the one model as ready."""
    entries = client.get_model_repository_index()
    assert [(entry["name"], entry["state"]) for entry in entries] == [(MODEL, "READY")]


def test_statistics_count_what_was_inferred(client: triton.InferenceServerClient, encoded: list[bytes]) -> None:
    """Images, batches and requests go up by what was asked, failures by what failed, and times with them."""
    (before,) = client.get_inference_statistics(MODEL)["model_stats"]
    client.infer(MODEL, [image_input(encoded)])
    client.infer(MODEL, [pixels_input(some_pixels(3))])
    with pytest.raises(InferenceServerException):
        client.infer(MODEL, [image_input(encoded)], timeout=1)
    (after,) = client.get_inference_statistics()["model_stats"]
    assert after["name"] == MODEL
    assert after["inference_count"] - before["inference_count"] == len(encoded) + 3
    assert after["execution_count"] - before["execution_count"] == 2
    assert after["last_inference"] > before["last_inference"]
    growth = {
        name: (
            statistic["count"] - before["inference_stats"][name]["count"],
            statistic["ns"] - before["inference_stats"][name]["ns"],
        )
        for name, statistic in after["inference_stats"].items()
    }
    for name in ("success", "queue", "compute_input", "compute_infer"):
        assert growth[name][0] == 2
        assert growth[name][1] > 0
    assert growth["compute_output"][0] == 2
    assert growth["fail"][0] == 1
    assert growth["fail"][1] > 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.load_model(MODEL),
        lambda client: client.get_trace_settings(),
        lambda client: client.register_system_shared_memory("region", "/region", 16),
    ],
)
def test_extensions_that_the_server_does_not_name_are_refused(
    client: triton.InferenceServerClient, ask: Callable[[triton.InferenceServerClient], Any]
) -> None:
    """The client raises its own exception, with a status and a sentence."""
    with pytest.raises(InferenceServerException, match="nothing at this path") as refusal:
        ask(client)
    assert refusal.value.status() == "404"


# Inference


def test_every_input_gives_what_predict_gives(
    service: ServiceProcess,
    client: triton.InferenceServerClient,
    encoded: list[bytes],
    sample_images: NDArray[np.uint8],
    expected: list[dict[str, Any]],
) -> None:
    """Encoded images and pixels, binary and JSON, get the labels and scores of ``/predict/batch``."""
    names = class_names(service)
    for tensor in (
        image_input(encoded),
        image_input(encoded, binary=False),
        pixels_input(sample_images),
        pixels_input(sample_images, binary=False),
    ):
        result = client.infer(MODEL, [tensor])
        assert labels(result, names) == [entry["label"] for entry in expected]
        scores = result.as_numpy("probabilities").max(1)
        assert scores == pytest.approx([entry["score"] for entry in expected], abs=2e-3)


@pytest.mark.parametrize("binary", [True, False])
def test_the_outputs_are_a_distribution_and_a_typicality_for_each_image(
    client: triton.InferenceServerClient, sample_images: NDArray[np.uint8], binary: bool
) -> None:
    """FP32 [N, 10] that sums to 1 and FP32 [N], in JSON or after it, with the model's name and version and the request's id."""
    names = ("probabilities", "typicality")
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = client.infer(MODEL, [pixels_input(sample_images)], outputs=outputs, request_id="a request's own id / 42")
    probabilities, typicality = (result.as_numpy(name) for name in names)
    assert (probabilities.dtype, typicality.dtype) == (np.float32, np.float32)
    assert (probabilities.shape, typicality.shape) == ((len(sample_images), 10), (len(sample_images),))
    assert probabilities.sum(1) == pytest.approx(np.ones(len(sample_images)), abs=1e-5)
    assert ((typicality >= 0) & (typicality <= 1)).all()
    response = result.get_response()
    assert response["id"] == "a request's own id / 42"
    assert response["model_name"] == MODEL
    assert response["model_version"] == client.get_model_metadata(MODEL)["versions"][0]
    for described in map(result.get_output, names):
        assert ("data" in described) != binary
        assert ("parameters" in described) == binary


def test_typicality_is_that_of_predict(
    client: triton.InferenceServerClient, encoded: list[bytes], expected: list[dict[str, Any]]
) -> None:
    """It may be the only output, and is one of all that are sent where none is named."""
    alone = client.infer(MODEL, [image_input(encoded)], outputs=[triton.InferRequestedOutput("typicality")])
    assert alone.as_numpy("probabilities") is None
    for result in (alone, client.infer(MODEL, [image_input(encoded)])):
        assert result.as_numpy("typicality") == pytest.approx([entry["typicality"] for entry in expected], abs=2e-2)


def test_a_model_without_typicality_has_no_such_output(application: ApplicationServer) -> None:
    """Neither in metadata nor in a response, and whoever asks for it is refused."""
    with triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
        names = [output["name"] for output in client.get_model_metadata("scripted")["outputs"]]
        answered = client.infer("scripted", [pixels_input(some_pixels())]).get_response()["outputs"]
        assert names == [output["name"] for output in answered] == ["probabilities"]
        with pytest.raises(InferenceServerException, match="'outputs' must name 'probabilities' once") as refusal:
            client.infer("scripted", [pixels_input(some_pixels())], outputs=[triton.InferRequestedOutput("typicality")])
        assert refusal.value.status() == "400"


def test_more_images_than_one_batch_come_back_in_order(
    client: triton.InferenceServerClient, sample_images: NDArray[np.uint8]
) -> None:
    """A request of four batches is answered as one, each row of each output for its own image."""
    many = np.concatenate([sample_images] * 6)
    once, result = (client.infer(MODEL, [pixels_input(pixels)]) for pixels in (sample_images, many))
    for name, tolerance in (("probabilities", 2e-3), ("typicality", 2e-2)):
        assert result.as_numpy(name) == pytest.approx(np.concatenate([once.as_numpy(name)] * 6), abs=tolerance)


def test_a_body_without_json_is_one_image(
    service: ServiceProcess, encoded: list[bytes], expected: list[dict[str, Any]]
) -> None:
    """Triton's raw binary request: a header length of 0, the image itself, the answer in binary."""
    response = httpx.post(
        f"{service.url}/v2/models/{MODEL}/infer",
        content=encoded[0],
        headers={"Inference-Header-Content-Length": "0", "Accept-Encoding": "identity"},
    )
    length = int(response.headers["Inference-Header-Content-Length"])
    result = triton.InferenceServerClient.parse_response_body(response.content, header_length=length)
    assert result.as_numpy("probabilities").shape == (1, 10)
    assert labels(result, class_names(service)) == [expected[0]["label"]]


@pytest.mark.parametrize(("class_count", "binary"), [(3, True), (1000, False)])
def test_classification_gives_the_likeliest_classes(
    client: triton.InferenceServerClient,
    encoded: list[bytes],
    expected: list[dict[str, Any]],
    class_count: int,
    binary: bool,
) -> None:
    """``value:index:label``, the likeliest first, as many as asked for and there are."""
    outputs = output(class_count=class_count, binary_data=binary)
    result = client.infer(MODEL, [image_input(encoded)], outputs=outputs)
    rows = result.as_numpy("probabilities")
    assert rows.shape == (len(encoded), min(class_count, 10))
    for row, entry in zip(rows, expected, strict=True):
        texts = [text.decode() if isinstance(text, bytes) else text for text in row]
        best = texts[0].split(":")
        assert best[2] == entry["label"]
        assert float(best[0]) == pytest.approx(entry["score"], abs=2e-3)
        values = [float(text.split(":")[0]) for text in texts]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("request_compression", "response_compression", "binary"),
    [("gzip", None, True), (None, "gzip", False), ("deflate", "deflate", True)],
)
def test_bodies_may_be_compressed_both_ways(
    client: triton.InferenceServerClient,
    sample_images: NDArray[np.uint8],
    request_compression: str | None,
    response_compression: str | None,
    binary: bool,
) -> None:
    """Either body in either encoding gives the answer of none."""
    plain = client.infer(MODEL, [pixels_input(sample_images[:2])]).as_numpy("probabilities")
    result = client.infer(
        MODEL,
        [pixels_input(sample_images[:2], binary=binary)],
        outputs=output(binary_data=binary),
        request_compression_algorithm=request_compression,
        response_compression_algorithm=response_compression,
    )
    assert result.as_numpy("probabilities") == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate, gzip", "deflate"),
        ("deflate;q=0.5, gzip;q=0.8", "gzip"),
        ("br, zstd", None),
        ("identity", None),
        ("gzip;q=0", None),
        ("gzip;q=much", None),
    ],
)
def test_the_response_is_encoded_as_the_client_accepts(
    application: ApplicationServer, accept: str, encoding: str | None
) -> None:
    """The first of the heaviest encodings is taken, and none where none is known."""
    tensor = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [0] * 3072}
    response = httpx.post(
        f"{application.url}/v2/models/scripted/infer", json={"inputs": [tensor]}, headers={"Accept-Encoding": accept}
    )
    assert response.headers.get("content-encoding") == encoding
    assert response.json()["outputs"][0]["data"] == pytest.approx([0.7, 0.2, 0.1])


def test_the_asyncio_client_works_as_well(
    service: ServiceProcess, encoded: list[bytes], sample_images: NDArray[np.uint8], expected: list[dict[str, Any]]
) -> None:
    """``tritonclient.http.aio``: health, metadata, many inferences at once in every encoding, and its exception."""

    async def talk() -> None:
        async with triton_aio.InferenceServerClient(service.url.removeprefix("http://")) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL)
            assert not await client.is_model_ready("resnet50")
            assert (await client.get_server_metadata())["extensions"]
            (version,) = (await client.get_model_metadata(MODEL))["versions"]
            assert (await client.get_model_config(MODEL, version))["name"] == MODEL
            assert (await client.get_model_repository_index())[0]["name"] == MODEL
            assert (await client.get_inference_statistics(MODEL))["model_stats"][0]["name"] == MODEL
            results = await asyncio.gather(
                *(
                    client.infer(
                        MODEL,
                        [tensor],
                        request_compression_algorithm=compression,
                        response_compression_algorithm=compression,
                        outputs=output(binary_data=binary),
                    )
                    for tensor in (image_input(encoded), pixels_input(sample_images), image_input(encoded, binary=False))
                    for compression, binary in ((None, True), ("gzip", False))
                )
            )
            for result in results:
                assert labels(result, names) == [entry["label"] for entry in expected]
            with pytest.raises(InferenceServerException, match="Input should be 'probabilities' or 'typicality'") as refusal:
                await client.infer(MODEL, [pixels_input(sample_images)], outputs=[triton.InferRequestedOutput("logits")])
            assert refusal.value.status() == "400"

    names = class_names(service)
    asyncio.run(talk())


# Mistakes


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "wanted"),
    [
        ("pixels", "BYTES", (1, 3, 32, 32), r"UINT8 \[N, 3, 32, 32\]"),
        ("pixels", "FP32", (1, 3, 32, 32), r"UINT8 \[N, 3, 32, 32\]"),
        ("pixels", "UINT8", (3, 32, 32), r"UINT8 \[N, 3, 32, 32\]"),
        ("pixels", "UINT8", (1, 32, 32, 3), r"UINT8 \[N, 3, 32, 32\]"),
        ("pixels", "UINT8", (0, 3, 32, 32), r"UINT8 \[N, 3, 32, 32\]"),
        ("pixels", "UINT8", (3072,), r"UINT8 \[N, 3, 32, 32\]"),
        ("image", "UINT8", (3,), r"BYTES \[N\]"),
        ("image", "FP16", (3,), r"BYTES \[N\]"),
        ("image", "BYTES", (1, 1), r"BYTES \[N\]"),
        ("image", "BYTES", (0,), r"BYTES \[N\]"),
        ("image", "BYTES", (), r"BYTES \[N\]"),
    ],
)
def test_an_input_of_another_datatype_or_shape_is_refused(
    client: triton.InferenceServerClient, name: str, datatype: str, shape: tuple[int, ...], wanted: str
) -> None:
    """The refusal says which ones the inputs have."""
    tensor = triton.InferInput(name, list(shape), datatype)
    values: Any = np.full(shape, b"0", np.object_) if datatype == "BYTES" else np.zeros(shape, triton_to_np_dtype(datatype))
    tensor.set_data_from_numpy(values)
    with pytest.raises(InferenceServerException, match=wanted) as refusal:
        client.infer(MODEL, [tensor])
    assert refusal.value.status() == "400"


def test_inputs_are_one_of_two(client: triton.InferenceServerClient, encoded: list[bytes]) -> None:
    """No input, an unknown one, the same one twice, and both at once are refused with what to send."""
    pixels, image = pixels_input(some_pixels()), image_input(encoded[:1])
    unknown = triton.InferInput("input", [1, 3, 32, 32], "UINT8").set_data_from_numpy(some_pixels())
    for inputs in ([], [unknown], [pixels, pixels], [image, pixels], [pixels, unknown]):
        with pytest.raises(InferenceServerException, match=r"send one input: 'image' .* or 'pixels'") as refusal:
            client.infer(MODEL, inputs)
        assert refusal.value.status() == "400"


def test_an_input_without_data_is_refused(client: triton.InferenceServerClient) -> None:
    """A tensor that was described and never filled is not taken for an empty one."""
    with pytest.raises(InferenceServerException, match="needs either 'data' or") as refusal:
        client.infer(MODEL, [triton.InferInput("pixels", [1, 3, 32, 32], "UINT8")])
    assert refusal.value.status() == "400"


def test_shared_memory_is_refused_both_ways(client: triton.InferenceServerClient) -> None:
    """The server does not name that extension, and says what to do instead."""
    tensor = triton.InferInput("pixels", [1, 3, 32, 32], "UINT8").set_shared_memory("region", 3072)
    with pytest.raises(InferenceServerException, match="shared memory is not available") as refusal:
        client.infer(MODEL, [tensor])
    assert refusal.value.status() == "400"
    (requested,) = output()
    requested.set_shared_memory("region", 40)
    with pytest.raises(InferenceServerException, match="shared memory is not available") as refusal:
        client.infer(MODEL, [pixels_input(some_pixels())], outputs=[requested])
    assert refusal.value.status() == "400"


def test_unknown_and_repeated_outputs_are_refused(client: triton.InferenceServerClient) -> None:
    """The refusal names the outputs there are."""
    for outputs in (
        [triton.InferRequestedOutput("logits")],
        output() * 3,
        [triton.InferRequestedOutput("typicality", class_count=2)],
    ):
        with pytest.raises(InferenceServerException, match="'probabilities'") as refusal:
            client.infer(MODEL, [pixels_input(some_pixels())], outputs=outputs)
        assert refusal.value.status() == "400"


@pytest.mark.parametrize(
    ("bad", "status"), [(b"", "422"), (b"no image", "422"), (b"GIF89a", "422"), (b"II*\0" + bytes(40), "415")]
)
def test_one_bad_image_fails_the_request_and_is_named(
    client: triton.InferenceServerClient, encoded: list[bytes], bad: bytes, status: str
) -> None:
    """The protocol has no error of one entry; the refusal says which image it was."""
    with pytest.raises(InferenceServerException, match="image 2: ") as refusal:
        client.infer(MODEL, [image_input([*encoded[:2], bad, *encoded[2:4]])])
    assert refusal.value.status() == status


def test_a_deadline_that_cannot_be_met_is_missed(client: triton.InferenceServerClient, encoded: list[bytes]) -> None:
    """``timeout`` is in microseconds, and 0 means the server's own."""
    with pytest.raises(InferenceServerException, match="deadline") as refusal:
        client.infer(MODEL, [image_input(encoded)], timeout=1)
    assert refusal.value.status() == "504"
    assert client.infer(MODEL, [image_input(encoded)], timeout=0).as_numpy("probabilities").shape == (len(encoded), 10)


def post(application: ApplicationServer, content: bytes, **headers: str) -> httpx.Response:
    """Send a body that the stock client would not."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{application.url}/v2/models/scripted/infer", content=content, headers=names)


def post_json(application: ApplicationServer, document: Any) -> httpx.Response:
    """Send any document as JSON."""
    return httpx.post(f"{application.url}/v2/models/scripted/infer", json=document)


def pixels_json(**members: Any) -> dict[str, Any]:
    """A request that would be answered, but for these members of its input; None leaves one out."""
    tensor = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [0] * 3072} | members
    return {"inputs": [{name: value for name, value in tensor.items() if value is not None}]}


def image_json(*data: Any) -> dict[str, Any]:
    """A request with this data for ``image``."""
    return {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": list(data)}]}


@pytest.mark.parametrize(
    ("document", "status", "fragment"),
    [
        ([], 400, "the request: Input should be"),
        ({}, 400, "inputs: Field required; send one input: 'image'"),
        ({"inputs": {}}, 400, "inputs: Input should be a valid list"),
        ({"inputs": [{}]}, 400, "inputs.0.name: Field required"),
        (pixels_json(datatype=8), 400, "inputs.0.datatype: Input should be 'BYTES' or 'UINT8'"),
        (pixels_json(shape=None), 400, "inputs.0.shape: Field required"),
        (pixels_json(shape=[1, 3, 32, "32"]), 400, "inputs.0.shape.3: Input should be a valid integer"),
        (pixels_json(shape=[True, 3, 32, 32]), 400, "inputs.0.shape.0: Input should be a valid integer"),
        (pixels_json(shape=[1.0, 3, 32, 32]), 400, "inputs.0.shape.0: Input should be a valid integer"),
        (pixels_json(shape=[-1, 3, 32, 32]), 400, "'pixels' (UINT8 [N, 3, 32, 32])"),
        (pixels_json(shape=[5, 3, 32, 32]), 422, "5 images and the limit is 4"),
        (pixels_json(data="AAAA"), 400, "inputs.0.data: Input should be a valid list"),
        (pixels_json(data=[]), 400, "0 elements in its data and 3,072 by its shape"),
        (pixels_json(data=[[0] * 3071]), 400, "3,071 elements"),
        (pixels_json(data=[[[0] * 32] * 32] * 3), 400, "3 elements"),
        (pixels_json(data=[-1] * 3072), 400, "whole numbers from 0 to 255"),
        (pixels_json(data=[10**30] * 3072), 400, "whole numbers from 0 to 255"),
        (pixels_json(data=[0.5] * 3072), 400, "whole numbers from 0 to 255"),
        (pixels_json(data=["0"] * 3072), 400, "whole numbers from 0 to 255"),
        (pixels_json(data=[[0], *[0] * 3071]), 400, "whole numbers from 0 to 255"),
        (pixels_json(data=[[[[[0] * 3072]]]]), 400, "whole numbers from 0 to 255"),
        (pixels_json(parameters={"binary_data_size": 3072}), 400, "and not both"),
        (pixels_json(data=None, parameters={"binary_data_size": 3072}), 400, "Inference-Header-Content-Length"),
        (pixels_json(data=None, parameters={"binary_data_size": -1}), 400, "binary_data_size: Input should be greater"),
        (pixels_json(parameters=[]), 400, "inputs.0.parameters: Input should be"),
        (image_json("", ""), 400, "2 elements in its data and 1 by its shape"),
        (image_json(5), 400, "not a string"),
        (image_json("not base64!"), 400, "element 0 of 'image' is not valid base64"),
        (image_json("http://example.org/cat.png"), 400, "URLs are not fetched"),
        (pixels_json() | {"id": 42}, 400, "id: Input should be a valid string"),
        (
            pixels_json() | {"parameters": {"timeout": -1}},
            400,
            "parameters.timeout: Input should be greater than or equal to 0",
        ),
        (pixels_json() | {"parameters": {"binary_data_output": 1}}, 400, "binary_data_output: Input should be a valid boolean"),
        (pixels_json() | {"outputs": ["probabilities"]}, 400, "outputs.0: Input should be"),
    ],
)
def test_requests_that_do_not_fit_the_protocol_are_refused(
    application: ApplicationServer, document: Any, status: int, fragment: str
) -> None:
    """One sentence says where something is wrong, and what."""
    response = post_json(application, document)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    assert fragment in response.json()["error"]


def test_parameters_that_are_null_or_have_no_meaning_here_are_let_through(application: ApplicationServer) -> None:
    """Sequences, priorities and custom parameters change nothing for a model without state."""
    parameters = {"timeout": None, "binary_data_output": None, "sequence_id": 7, "priority": 1, "customer": "a"}
    document = pixels_json(parameters={"binary_data_size": None}) | {"id": None, "outputs": None, "parameters": parameters}
    response = post_json(application, document)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in response.headers
    assert response.json()["outputs"][0]["data"] == pytest.approx([0.7, 0.2, 0.1])


@pytest.mark.parametrize("data", [[0] * 3072, [[0] * 3072], [[[[0] * 32] * 32] * 3]])
def test_json_data_is_flat_or_nested(application: ApplicationServer, data: list[Any]) -> None:
    """The protocol allows both; the elements count."""
    assert post_json(application, pixels_json(data=data)).status_code == 200


def binary_request(header: dict[str, Any], data: bytes) -> tuple[bytes, str]:
    """A body with binary data, and the length of its JSON."""
    text = json.dumps(header).encode()
    return text + data, str(len(text))


@pytest.mark.parametrize(
    ("data", "size", "fragment"),
    [
        (bytes(3071), 3071, "3,071 elements in its data and 3,072 by its shape"),
        (bytes(3072), 3071, "3,071 bytes by 'binary_data_size' and 3,072 follow"),
        (bytes(3071), 3072, "3,072 bytes by 'binary_data_size' and 3,071 follow"),
        (b"", 3072, "and 0 follow the JSON"),
    ],
)
def test_binary_pixels_of_another_length_are_refused(
    application: ApplicationServer, data: bytes, size: int, fragment: str
) -> None:
    """Shape, announced size and bytes must agree."""
    body, length = binary_request(pixels_json(data=None, parameters={"binary_data_size": size}), data)
    response = post(application, body, Inference_Header_Content_Length=length)
    assert response.status_code == 400
    assert fragment in response.json()["error"]


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        (b"", "ends within element 0 of 2"),
        (b"\0\0\0", "ends within element 0 of 2"),
        (struct.pack("<I", 9) + b"8 bytes.", "ends within element 0 of 2"),
        (struct.pack("<I", 1) + b"a", "ends within element 1 of 2"),
        (struct.pack("<I", 2**32 - 1) + b"a", "ends within element 0 of 2"),
        (struct.pack(">I", 1) + b"a" + struct.pack(">I", 1) + b"a", "ends within element 0 of 2"),
        (struct.pack("<I", 0) * 3, "4 bytes after the 2 elements of its shape"),
    ],
)
def test_binary_images_of_other_lengths_are_refused(application: ApplicationServer, data: bytes, fragment: str) -> None:
    """Each image follows its length, and nothing follows the last."""
    tensor = {"name": "image", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    body, length = binary_request({"inputs": [tensor]}, data)
    response = post(application, body, Inference_Header_Content_Length=length)
    assert response.status_code == 400
    assert fragment in response.json()["error"]


@pytest.mark.parametrize("length", ["-1", "1.5", "many", "", "100000", "9" * 5000, "1_0"])
def test_a_header_length_that_cannot_be_is_refused(application: ApplicationServer, length: str) -> None:
    """It counts bytes of the body."""
    response = post(application, json.dumps(pixels_json()).encode(), Inference_Header_Content_Length=length)
    assert response.status_code == 400
    assert "Inference-Header-Content-Length must be from 0" in response.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000, b'{"inputs": NaN}', b"\0" * 100])
def test_a_body_that_is_no_json_is_refused(application: ApplicationServer, body: bytes) -> None:
    """An empty body is no request, and no raw one either."""
    response = post(application, body)
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]


# Limits


def test_too_large_a_body_is_refused(application: ApplicationServer) -> None:
    """``max_body_bytes`` holds for the body as it comes."""
    response = post(application, bytes(120_001))
    assert response.status_code == 413
    assert "120,000 bytes" in response.json()["error"]


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_too_large_a_body_is_refused_when_it_is_decompressed(
    application: ApplicationServer, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    """A small body that would become a large one is cut off at the same limit."""
    bomb = compress(bytes(20_000_000))
    assert len(bomb) < 120_000
    response = post(application, bomb, Content_Encoding=encoding)
    assert response.status_code == 413
    assert "120,000 bytes when decompressed" in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"not compressed", "gzip", 400),
        (gzip.compress(b"{}")[:-4], "gzip", 400),
        (gzip.compress(b"{}") + b"more", "gzip", 400),
        (b"", "deflate", 400),
        (b"{}", "br", 415),
        (b"{}", "gzip, gzip", 415),
    ],
)
def test_damaged_and_unknown_encodings_are_refused(
    application: ApplicationServer, body: bytes, encoding: str, status: int
) -> None:
    """What cannot be decompressed whole is not guessed at."""
    response = post(application, body, Content_Encoding=encoding)
    assert response.status_code == status
    assert list(response.json()) == ["error"]


def test_too_large_an_image_is_refused(application: ApplicationServer, png: Callable[[int, int], bytes]) -> None:
    """``max_image_pixels`` holds, by the image's header."""
    with triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
        with pytest.raises(InferenceServerException, match=r"image 1: .*the limit is 2,000") as refusal:
            client.infer("scripted", [image_input([png(32, 32), png(50, 41)])])
        assert refusal.value.status() == "413"


def test_large_images_are_not_refused_for_their_company(png: Callable[[int, int], bytes]) -> None:
    """A request may hold more large images than may wait for the decoding threads."""
    with ApplicationServer(decode_threads=1, max_batch_size=200) as application:
        images = [png(150, 150)] * 100
        with triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
            result = client.infer("scripted", [image_input(images)])
        assert result.as_numpy("probabilities").shape == (100, 3)


# What becomes of the engine


def test_a_service_that_starts_says_so() -> None:
    """Live, not ready, and every question about the model is put off with 503."""
    with ApplicationServer() as application, triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
        application.engine.state = "starting"
        application.engine.model = None
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("scripted")
        for ask in (
            client.get_model_repository_index,
            lambda: client.get_model_metadata("scripted"),
            lambda: client.get_model_config("scripted"),
            lambda: client.infer("scripted", [pixels_input(some_pixels())]),
        ):
            with pytest.raises(InferenceServerException, match="starting") as refusal:
                ask()
            assert refusal.value.status() == "503"


def test_a_service_that_drains_is_live_and_not_ready() -> None:
    """The model is still known, and not ready."""
    with ApplicationServer() as application, triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
        application.supervisor.draining = True
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("scripted")
        assert client.get_model_metadata("scripted")["name"] == "scripted"
        assert client.get_model_repository_index()[0]["state"] == "UNAVAILABLE"


def test_a_service_that_gave_up_is_not_live() -> None:
    """An orchestrator shall start it again."""
    with ApplicationServer() as application, triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
        application.engine.state = "starting"
        application.supervisor.engine_gave_up = True
        assert not client.is_server_live()
        assert not client.is_server_ready()


def test_a_full_queue_says_when_to_come_back() -> None:
    """429 with ``Retry-After``, as the protocol's error."""
    with ApplicationServer() as application:
        application.engine.refuse = Overloaded("the queue is full; retry after the time given", retry_after_s=7)
        response = post_json(application, pixels_json())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json() == {"error": "the queue is full; retry after the time given"}


def test_one_model_answers_the_whole_request() -> None:
    """When the model is replaced between two batches of a request, the new one answers all of it."""
    new = ModelInfo("scripted", "ba9876543210", SCRIPTED_MODEL.class_names, InputSpec())
    calls: list[int] = []

    def replaced_after_the_first(images: NDArray[np.uint8]) -> Prediction:
        calls.append(len(images))
        answered = probabilities(images)
        return answered if len(calls) == 1 else Prediction(answered.probabilities, new, 0.0, 0.0, len(images))

    with ApplicationServer(max_batch_size=2) as application:
        application.engine.answer = replaced_after_the_first
        with triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
            response = client.infer("scripted", [pixels_input(some_pixels(3))]).get_response()
    assert response["model_version"] == new.version
    assert response["outputs"][0]["shape"] == [3, 3]
    assert calls == [2, 1, 2, 1]


def test_a_version_that_was_replaced_meanwhile_does_not_answer() -> None:
    """Who asks for a version gets an answer of that version or none."""
    new = ModelInfo("scripted", "ba9876543210", SCRIPTED_MODEL.class_names, InputSpec())
    with ApplicationServer() as application:
        application.engine.answer = lambda images: Prediction(probabilities(images).probabilities, new, 0.0, 0.0, 1)
        with triton.InferenceServerClient(application.url.removeprefix("http://")) as client:
            with pytest.raises(InferenceServerException, match="no such version") as refusal:
                client.infer("scripted", [pixels_input(some_pixels())], model_version=SCRIPTED_MODEL.version)
            assert refusal.value.status() == "404"


# The rest of HTTP


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/scripted/infer", 405),
        ("POST", "/v2/models/scripted", 405),
        ("GET", "/v2/nothing", 404),
        ("POST", "/v2/models/scripted/generate", 404),
    ],
)
def test_every_error_below_v2_is_the_protocols(application: ApplicationServer, method: str, path: str, status: int) -> None:
    """Clients of the protocol read ``error`` and nothing else."""
    response = httpx.request(method, application.url + path)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert response.headers["x-request-id"]


def test_a_missing_key_is_refused_in_the_dialect_and_health_needs_none() -> None:
    """401 as the protocol's error; probes go without a key."""
    with ApplicationServer(api_keys="secret") as application:
        address = application.url.removeprefix("http://")
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_ready()
            with pytest.raises(InferenceServerException, match="API key") as refusal:
                client.infer("scripted", [pixels_input(some_pixels())])
            assert refusal.value.status() == "401"
            result = client.infer("scripted", [pixels_input(some_pixels())], headers={"X-API-Key": "secret"})
            assert result.as_numpy("probabilities").shape == (1, 3)


def test_answers_carry_timing_and_id(application: ApplicationServer) -> None:
    """The headers are those of ``/predict``."""
    response = httpx.post(f"{application.url}/v2/models/scripted/infer", json=pixels_json(), headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-batch-size"] == "1"
    assert "compute;dur=" in response.headers["server-timing"]


def test_every_route_is_documented_and_every_reference_leads_somewhere(application: ApplicationServer) -> None:
    """The OpenAPI document has the paths of the protocol, with their bodies, and no dangling reference."""
    text = httpx.get(f"{application.url}/openapi.json").text
    document = json.loads(text)
    model, version = "/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}"
    ends = ("", "/ready", "/config", "/stats", "/infer")
    paths = {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/repository/index", "/v2/models/stats", "/hf"}
    assert paths | {base + end for base in (model, version) for end in ends} <= set(document["paths"])
    infer = document["paths"][f"{model}/infer"]["post"]
    assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in text.split('"$ref":"')[1:]}
    assert references
    assert {reference for reference in references if reference.removeprefix("#/components/schemas/") not in schemas} == set()
