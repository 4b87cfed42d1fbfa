"""The data of tensors, in JSON and in the binary tensor extension.

Binary data is row-major and little-endian; each element of BYTES comes after its length as uint32.
Source: Open Inference Protocol, "Tensor Data"; Triton, "Binary Tensor Data Extension".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import MalformedRequest
from service.routes.uploads import decode_base64

_LENGTH = struct.Struct("<I")


def read_images(data: list[Any] | memoryview, count: int) -> list[bytes | memoryview]:
    """Return the ``count`` encoded images of the input ``image``, from JSON (base64) or from binary data, which is not copied.

    Raises MalformedRequest for other elements, or another number of them.
    """
    if isinstance(data, memoryview):
        return _split(data, count)
    _check_number(len(data), count, "image")
    for index, text in enumerate(data):
        if not isinstance(text, str):
            raise MalformedRequest(f"element {index} of 'image' is not a string; send each image in base64")
    return [decode_base64(text, f"element {index} of 'image'") for index, text in enumerate(data)]


def read_pixels(data: list[Any] | memoryview, shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return the input ``pixels`` as an array of ``shape``, from JSON (flat or nested) or from binary data.

    An array from binary data is a read-only view of it. Raises MalformedRequest for other elements, or another number of them.
    """
    values = data if isinstance(data, memoryview) else _uint8(data, shape)
    _check_number(len(values), math.prod(shape), "pixels")
    return np.frombuffer(values, np.uint8).reshape(shape)


def write_bytes(elements: Sequence[bytes]) -> bytes:
    """Make binary BYTES data: each element after its length."""
    return b"".join(_LENGTH.pack(len(element)) + element for element in elements)


def _split(data: memoryview, count: int) -> list[bytes | memoryview]:
    elements: list[bytes | memoryview] = []
    start = 0
    for index in range(count):
        length = _LENGTH.unpack_from(data, start)[0] if len(data) - start >= _LENGTH.size else len(data)
        start += _LENGTH.size
        if len(data) - start < length:
            raise MalformedRequest(
                f"the data of 'image' ends within element {index} of {count}; send each after its length as uint32"
            )
        elements.append(data[start : start + length])
        start += length
    if start != len(data):
        raise MalformedRequest(
            f"'image' has {len(data) - start:,} bytes after the {count} elements of its shape; make them agree"
        )
    return elements


def _uint8(data: list[Any], shape: Sequence[int]) -> bytes:
    # Numpy would take floats and strings for whole numbers, and memory for as many strings as long as the longest; bytes() is
    # strict, and as fast.
    if len(data) != shape[0]:  # before every element of a long list is looked at
        _check_number(len(data), math.prod(shape), "pixels")
    try:
        for _ in shape[1:]:
            if isinstance(data[0], list):
                data = list(chain.from_iterable(data))
        if b"e" in orjson.dumps(data):  # true or false, which bytes() takes for 1 and 0
            raise TypeError
        return bytes(data)
    except (TypeError, ValueError, IndexError):
        raise MalformedRequest("'pixels' is UINT8; send whole numbers from 0 to 255, flat or nested as its shape") from None


def _check_number(elements: int, expected: int, name: str) -> None:
    if elements != expected:
        raise MalformedRequest(f"'{name}' has {elements:,} elements in its data and {expected:,} by its shape; make them agree")
