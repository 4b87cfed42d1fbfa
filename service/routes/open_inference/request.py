"""An inference request: its JSON, the binary data behind it, and every way in which they can be wrong.

Source: Open Inference Protocol, "Inference Request JSON Object"; Triton's extensions for binary data,
classification and schedule policy (``timeout``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import ModelInfo
from service.errors import InvalidParameter, MalformedRequest
from service.routes.open_inference import tensors
from service.web.body import load_json

_T = TypeVar("_T")

_MAX_JSON_COST = 100_000  # without pixels, each of which is a number; lists of 16 of them and more cost as much again
_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """How ``probabilities`` shall come back: ``class_count`` likeliest classes of each image as text, or 0 for the tensor."""

    binary: bool = False
    class_count: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request; ``images`` are encoded images, or uint8 (N, 3, size, size) that may look into the body and be read-only."""

    images: Sequence[bytes | memoryview] | NDArray[np.uint8]
    output: RequestedOutput
    id: str = ""
    timeout_s: float | None = None


def parse_request(body: bytes, header_length: bytes | None, model: ModelInfo, max_images: int) -> InferRequest:
    """Read a request from a body whose first ``header_length`` bytes are JSON, or all of it where there is no such header.

    With a length of 0 the body is one encoded image (Triton's raw binary request). Raises MalformedRequest for what does not
    fit the protocol or the model, and InvalidParameter for more than ``max_images`` images.
    """
    length = _header_length(body, header_length)
    if length == 0:
        return InferRequest([body], RequestedOutput(binary=True))
    pixels = max_images * 3 * model.input.size**2
    hint = "the request is not valid JSON; when binary data follows it, send its length as Inference-Header-Content-Length"
    document = load_json(body[:length], max_cost=_MAX_JSON_COST + 2 * pixels, hint=hint)
    if not isinstance(document, dict):
        raise MalformedRequest("the request is not a JSON object; send one with 'inputs'")
    parameters = _member(document, "parameters", dict) or {}
    timeout_us = _member(parameters, "timeout", int) or 0
    if timeout_us < 0:
        raise MalformedRequest("'timeout' must not be negative; it is in microseconds")
    return InferRequest(
        images=_images(document, memoryview(body)[length:], model, max_images),
        output=_output(document, tensors.output_spec(model), _member(parameters, "binary_data_output", bool) or False),
        id=_member(document, "id", str) or "",
        timeout_s=timeout_us / 1e6 if timeout_us else None,
    )


def _header_length(body: bytes, header_length: bytes | None) -> int:
    if header_length is None:
        return max(1, len(body))  # an empty body is no raw request
    if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > len(body):
        raise MalformedRequest(
            f"Inference-Header-Content-Length must be from 0 to {len(body)}, the length of the body; it counts the JSON's bytes"
        )
    return int(header_length)


def _images(
    document: dict[str, Any], binary: memoryview, model: ModelInfo, max_images: int
) -> Sequence[bytes | memoryview] | NDArray[np.uint8]:
    """Take the one input, whichever it is."""
    specs = tensors.input_specs(model)
    choice = "send one input: " + " or ".join(
        f"'{spec.name}' ({spec.datatype} {_shown(spec.shape)})" for spec in specs.values()
    )
    inputs = _member(document, "inputs", list)
    if not inputs:
        raise MalformedRequest(f"the request has no inputs; {choice}")
    names = [_required(tensor, "name", str, "an input") for tensor in inputs]
    unknown = next((name for name in names if name not in specs), None)
    if unknown is not None:
        raise MalformedRequest(f"the model has no input of the name in 'inputs[{names.index(unknown)}]'; {choice}")
    if len(names) > 1:
        raise MalformedRequest(f"the request has {len(names)} inputs; {choice}")
    tensor, spec = inputs[0], specs[names[0]]
    shape = _shape(tensor, spec, max_images)
    data = _data(tensor, spec.name, binary)
    if spec.datatype == "BYTES":
        return tensors.read_bytes(data, shape[0], spec.name)
    return tensors.read_uint8(data, shape, spec.name)


def _shape(tensor: dict[str, Any], spec: tensors.TensorSpec, max_images: int) -> tuple[int, ...]:
    """Check datatype and shape of an input, and give the shape."""
    wanted = f"send it as {spec.datatype} {_shown(spec.shape)}"
    datatype = _required(tensor, "datatype", str, f"'{spec.name}'")
    if datatype != spec.datatype:
        raise MalformedRequest(f"'{spec.name}' is not of this datatype; {wanted}")
    shape = _required(tensor, "shape", list, f"'{spec.name}'")
    if any(type(size) is not int for size in shape) or len(shape) != len(spec.shape):
        raise MalformedRequest(f"'{spec.name}' is not of this shape; {wanted}")
    if shape[0] < 1 or tuple(shape[1:]) != spec.shape[1:]:
        raise MalformedRequest(f"'{spec.name}' is not of the shape {_shown(shape)}; {wanted}, with at least one image")
    if shape[0] > max_images:
        raise InvalidParameter(f"the request has {shape[0]} images and the limit is {max_images}; send fewer in one request")
    return tuple(shape)


def _data(tensor: dict[str, Any], name: str, binary: memoryview) -> list[Any] | memoryview:
    """Give an input's data: the list in its JSON, or the bytes behind the JSON."""
    parameters = _member(tensor, "parameters", dict) or {}
    if "shared_memory_region" in parameters:
        raise MalformedRequest("shared memory is not available here; send the data in the request")
    size = _member(parameters, "binary_data_size", int)
    data = _member(tensor, "data", list)
    if (data is None) == (size is None):
        raise MalformedRequest(f"'{name}' needs either 'data' or the parameter 'binary_data_size', and not both")
    if (size or 0) != len(binary):
        raise MalformedRequest(
            f"'{name}' has {size or 0:,} bytes by 'binary_data_size' and {len(binary):,} follow the JSON; make them agree, and"
            " send the JSON's length as Inference-Header-Content-Length"
        )
    return binary if data is None else data


def _output(document: dict[str, Any], spec: tensors.TensorSpec, binary: bool) -> RequestedOutput:
    """Take the one output there is; ``binary`` holds unless the output itself says otherwise."""
    outputs = _member(document, "outputs", list)
    if not outputs:
        return RequestedOutput(binary)
    if any(_required(output, "name", str, "an output") != spec.name for output in outputs):
        raise MalformedRequest(f"the model has no such output; its only one is '{spec.name}'")
    if len(outputs) > 1:
        raise MalformedRequest(f"'outputs' names '{spec.name}' {len(outputs)} times; name it once")
    parameters = _member(outputs[0], "parameters", dict) or {}
    if "shared_memory_region" in parameters:
        raise MalformedRequest("shared memory is not available here; take the data from the response")
    class_count = _member(parameters, "classification", int) or 0
    if class_count < 0:
        raise MalformedRequest("'classification' must not be negative; it is the number of classes to give")
    own_binary = _member(parameters, "binary_data", bool)
    return RequestedOutput(binary if own_binary is None else own_binary, min(class_count, spec.shape[1]))


def _required(owner: Any, name: str, kind: type[_T], what: str) -> _T:
    value = _member(owner, name, kind) if isinstance(owner, dict) else None
    if value is None:
        raise MalformedRequest(f"{what} has no '{name}'; send {_KINDS[kind]}")
    return value


def _member(owner: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    """Give a member of a JSON object, None when it is missing or null; raise MalformedRequest when it is not of ``kind``."""
    value = owner.get(name)
    if value is None:
        return None
    if type(value) is not kind:  # bool is an int to isinstance, and not to JSON
        raise MalformedRequest(f"'{name}' is not {_KINDS[kind]}")
    return value


def _shown(shape: Sequence[int]) -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"
