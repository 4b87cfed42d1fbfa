"""The tensors that the model takes and gives, and their data in a request or a response.

Owns: names, datatypes, shapes, and the layout of data in JSON and in the binary tensor extension (row-major, little-endian,
each BYTES element behind its length as uint32). Does not know: whole requests, image formats.
Source: Open Inference Protocol, "Tensor Data"; Triton, "Binary Tensor Data Extension".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.interface import ModelInfo
from service.errors import MalformedRequest
from service.routes.uploads import decode_base64

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor; the first dimension of ``shape`` is the batch, -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def input_specs(model: ModelInfo) -> dict[str, TensorSpec]:
    """Give the inputs by name, of which a request has one: encoded images, or their pixels as the network takes them."""
    size = model.input.size
    return {
        "image": TensorSpec("image", "BYTES", (-1,)),
        "pixels": TensorSpec("pixels", "UINT8", (-1, 3, size, size)),
    }


def output_spec(model: ModelInfo) -> TensorSpec:
    """Give the only output: a calibrated probability for each class."""
    return TensorSpec("probabilities", "FP32", (-1, len(model.class_names)))


def read_bytes(data: list[Any] | memoryview, count: int, name: str) -> list[bytes | memoryview]:
    """Give the ``count`` elements of BYTES data, from JSON (base64) or from binary data, which is not copied.

    Raises MalformedRequest when it has other elements, or another number of them.
    """
    return _bytes_from_json(data, count, name) if isinstance(data, list) else _bytes_from_binary(data, count, name)


def read_uint8(data: list[Any] | memoryview, shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Give UINT8 data as an array of ``shape``, from JSON (flat or nested) or from binary data, which it looks into, read-only.

    Raises MalformedRequest when it has other elements, or another number of them.
    """
    return _uint8_from_json(data, shape, name) if isinstance(data, list) else _uint8_from_binary(data, shape, name)


def write_bytes(elements: Sequence[bytes]) -> bytes:
    """Make binary BYTES data: each element behind its length."""
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def _bytes_from_binary(data: memoryview, count: int, name: str) -> list[bytes | memoryview]:
    elements: list[bytes | memoryview] = []
    start = 0
    for index in range(count):
        length = _LENGTH.unpack_from(data, start)[0] if len(data) - start >= _LENGTH.size else None
        start += _LENGTH.size
        if length is None or len(data) - start < length:
            raise MalformedRequest(
                f"the data of '{name}' ends within element {index} of {count}; send each behind its length as uint32"
            )
        elements.append(data[start : start + length])
        start += length
    if start != len(data):
        raise MalformedRequest(
            f"'{name}' has {len(data) - start:,} bytes behind the {count} elements of its shape; make them agree"
        )
    return elements


def _bytes_from_json(data: list[Any], count: int, name: str) -> list[bytes | memoryview]:
    if len(data) != count:
        raise _disagreement(name, len(data), count)
    elements: list[bytes | memoryview] = []
    for index, text in enumerate(data):
        if not isinstance(text, str):
            raise MalformedRequest(f"element {index} of '{name}' is not a string; send each image in base64")
        elements.append(decode_base64(text, f"element {index} of '{name}'"))
    return elements


def _uint8_from_binary(data: memoryview, shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    if len(data) != math.prod(shape):
        raise _disagreement(name, len(data), math.prod(shape))
    return np.frombuffer(data, np.uint8).reshape(shape)


def _uint8_from_json(data: list[Any], shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    # Numpy would take floats and strings for whole numbers, and memory for as many strings as long as the longest; bytes() is
    # strict, and as fast.
    if len(data) not in (math.prod(shape), shape[0]):  # before every element of a long list is looked at
        raise _disagreement(name, len(data), math.prod(shape))
    try:
        for _ in shape[1:]:
            if isinstance(data[0], list):
                data = list(chain.from_iterable(data))
        values = bytes(data)
    except (TypeError, ValueError, IndexError):
        raise MalformedRequest(f"'{name}' is UINT8; send whole numbers from 0 to 255, flat or nested as its shape") from None
    if len(values) != math.prod(shape):
        raise _disagreement(name, len(values), math.prod(shape))
    return np.frombuffer(values, np.uint8).reshape(shape)


def _disagreement(name: str, elements: int, expected: int) -> MalformedRequest:
    return MalformedRequest(f"'{name}' has {elements:,} elements in its data and {expected:,} by its shape; make them agree")
