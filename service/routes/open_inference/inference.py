"""An inference request and its response: JSON, with tensors in it or as binary data after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from service.engine.interface import ModelInfo, Prediction
from service.errors import InvalidParameter, MalformedRequest, ServiceError
from service.observability.request_record import Answered
from service.routes.classification import Data, Pixels, classify, decode
from service.routes.context import ServiceContext
from service.routes.open_inference.schemas import (
    InferenceRequest,
    RequestedOutput,
    RequestInput,
    model_inputs,
    model_outputs,
)
from service.routes.open_inference.tensors import read_images, read_pixels, write_bytes
from service.web.body import load_json
from service.web.exchange import Exchange

_T = TypeVar("_T")

Images = Sequence[Data] | Pixels
"""Encoded images, or uint8 (N, 3, size, size), which may be a read-only view of the body."""

_MAX_JSON_COST = 100_000  # without pixels, each of which is a number; lists of 16 of them and more cost as much again
_NOT_JSON = "the request is not valid JSON; when binary data follows it, send its length as Inference-Header-Content-Length"
_RAW_REQUEST = InferenceRequest.model_validate(
    {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}], "parameters": {"binary_data_output": True}}
)


def read_request(
    body: bytes, header_length: bytes | None, model: ModelInfo, max_images: int
) -> tuple[InferenceRequest, Images]:
    """Read a request from a body whose first ``header_length`` bytes are JSON, or all of it where there is no such header.

    With a length of 0 the body is one encoded image (Triton's raw binary request). Raises MalformedRequest for what does not
    fit the protocol or the model, and InvalidParameter for more than ``max_images`` images.
    """
    length = _json_length(body, header_length)
    if length == 0:
        return _RAW_REQUEST, [body]
    pixels = max_images * 3 * model.input.size**2
    document = load_json(body[:length], max_cost=_MAX_JSON_COST + 2 * pixels, hint=_NOT_JSON)
    try:
        request = InferenceRequest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        hint = f"; {_inputs_of(model)}" if place.startswith("inputs") else ""
        raise MalformedRequest(f"{place}: {first['msg']}{hint}") from None
    requested_outputs(request, model)
    return request, _images(request.inputs[0], memoryview(body)[length:], model, max_images)


def requested_outputs(request: InferenceRequest, model: ModelInfo) -> list[RequestedOutput]:
    """Return the outputs to send, by default all; raise MalformedRequest unless ``model`` has each of them, asked for once."""
    names = [tensor.name for tensor in model_outputs(model)]
    outputs = request.outputs or [RequestedOutput.model_validate({"name": name}) for name in names]
    if not {output.name for output in outputs} <= set(names) or len(outputs) > len(names):
        raise MalformedRequest(f"'outputs' must name {' and '.join(map(repr, names))} once at most: the model has no others")
    if any(output.parameters.classification and output.name != "probabilities" for output in outputs):
        raise MalformedRequest("'classification' is for the output 'probabilities' only")
    return outputs


def make_response(request: InferenceRequest, prediction: Prediction) -> tuple[bytes, int | None]:
    """Return the body, and the length of its JSON where binary data follows it."""
    model = prediction.model
    mostly_binary = request.parameters is not None and request.parameters.binary_data_output
    described: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for output in requested_outputs(request, model):
        options = output.parameters
        values = prediction.probabilities if output.name == "probabilities" else prediction.typicality
        assert values is not None, "the model has this output"
        entry: dict[str, Any] = {"name": output.name, "datatype": "FP32", "shape": values.shape}
        classes = classify_rows(values, model, options.classification) if options.classification else None
        if classes is not None:
            entry |= {"datatype": "BYTES", "shape": (len(values), len(classes) // len(values))}
        if mostly_binary if options.binary_data is None else options.binary_data:
            chunk = values.astype("<f4").tobytes() if classes is None else write_bytes([text.encode() for text in classes])
            entry["parameters"] = {"binary_data_size": len(chunk)}
            chunks.append(chunk)
        else:
            entry["data"] = np.ascontiguousarray(values).reshape(-1) if classes is None else classes
        described.append(entry)
    document: dict[str, Any] = {"id": request.id} if request.id else {}
    document |= {"model_name": model.name, "model_version": model.version, "outputs": described}
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join((header, *chunks)), len(header) if chunks else None


def classify_rows(probabilities: NDArray[np.float32], model: ModelInfo, class_count: int) -> list[str]:
    """Return ``value:index:label`` for the ``class_count`` likeliest classes of each row, one row after the other."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :class_count]  # equal ones keep the order of the classes
    return [
        f"{probabilities[row, index]:.6f}:{index}:{model.class_names[index]}"
        for row, indices in enumerate(order.tolist())
        for index in indices
    ]


def _json_length(body: bytes, header_length: bytes | None) -> int:
    if header_length is None:
        return max(1, len(body))  # an empty body is no raw request
    if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > len(body):
        raise MalformedRequest(
            f"Inference-Header-Content-Length must be from 0 to {len(body)}, the length of the body; it counts the JSON's bytes"
        )
    return int(header_length)


def _images(tensor: RequestInput, binary: memoryview, model: ModelInfo, max_images: int) -> Images:
    """Check the input against the model, and read its data from the JSON or from the bytes after it."""
    wanted = next(each for each in model_inputs(model) if each.name == tensor.name)
    shape = tensor.shape
    if tensor.datatype != wanted.datatype or not shape or shape[0] < 1 or [-1, *shape[1:]] != wanted.shape:
        raise MalformedRequest(f"'{tensor.name}' has another datatype or shape, or no image; {_inputs_of(model)}")
    if shape[0] > max_images:
        raise InvalidParameter(f"the request has {shape[0]} images and the limit is {max_images}; send fewer in one request")
    size = tensor.parameters and tensor.parameters.binary_data_size
    if (tensor.data is None) == (size is None):
        raise MalformedRequest(f"'{tensor.name}' needs either 'data' or the parameter 'binary_data_size', and not both")
    if (size or 0) != len(binary):
        raise MalformedRequest(
            f"'{tensor.name}' has {size or 0:,} bytes by 'binary_data_size' and {len(binary):,} follow the JSON; make them"
            " agree, and send the JSON's length as Inference-Header-Content-Length"
        )
    data = binary if tensor.data is None else tensor.data
    return read_pixels(data, shape) if tensor.name == "pixels" else read_images(data, shape[0])


def _inputs_of(model: ModelInfo) -> str:
    shapes = [(each, ", ".join(["N", *map(str, each.shape[1:])])) for each in model_inputs(model)]
    return "send one input: " + " or ".join(f"'{each.name}' ({each.datatype} [{shape}])" for each, shape in shapes)


async def classify_images(context: ServiceContext, exchange: Exchange, images: Images) -> Answered:
    """Predict encoded images, or uint8 (N, 3, size, size), all by one model, in calls of at most ``max_batch_size`` images.

    Raises what the decoder raises for the first bad image, saying which one it is, and what the engine raises.
    """
    began = None
    if not isinstance(images, np.ndarray):
        if len(images) == 1:
            return await classify(context, exchange, images[0])
        slots, began = context.decoder.slots(), time.monotonic()

        async def decode_one(index: int, data: Data) -> NDArray[np.uint8]:
            try:
                return await decode(context, exchange, data, slots)
            except ServiceError as error:
                if error.status >= 429:  # not about this image
                    raise
                raise type(error)(f"image {index}: {error.detail}", retry_after_s=error.retry_after_s) from error

        images = np.stack(await _all_or_none(decode_one(index, data) for index, data in enumerate(images)))
    step = context.settings.max_batch_size
    chunks = [images[start : start + step] for start in range(0, len(images), step)]
    while True:
        done = await _all_or_none(classify(context, exchange, chunk, began=began) for chunk in chunks)
        # A model that was replaced between two chunks would make an answer of two models: the new one answers all.
        if all(each.prediction.model == done[0].prediction.model for each in done):
            return replace(done[0], prediction=_join([each.prediction for each in done]))


async def _all_or_none(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all; when one fails, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _join(predictions: Sequence[Prediction]) -> Prediction:
    """Make one prediction of several by one model; its times and its batch are the longest and the largest."""
    typicalities = [prediction.typicality for prediction in predictions if prediction.typicality is not None]
    return Prediction(
        np.concatenate([prediction.probabilities for prediction in predictions]),
        predictions[0].model,
        max(prediction.queue_s for prediction in predictions),
        max(prediction.compute_s for prediction in predictions),
        max(prediction.batch_size for prediction in predictions),
        np.concatenate(typicalities) if typicalities else None,
    )
