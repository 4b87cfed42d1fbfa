"""Whatever is sent to ``/v2``, a request is read or refused in words; and what a client writes is read back as it was."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidParameter, MalformedRequest
from service.routes.open_inference.inference import read_request, requested_outputs
from service.routes.open_inference.tensors import read_images, read_pixels, write_bytes
from tests.support.scripted_engine import MODEL

scalars = st.none() | st.booleans() | st.integers(-300, 2**40) | st.floats(allow_nan=False) | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner), max_leaves=8
)


def nearly(value: Any) -> st.SearchStrategy[Any]:
    """The right value, mostly."""
    return st.just(value) | st.just(value) | anything


parameters = st.fixed_dictionaries(
    {}, optional={"binary_data_size": nearly(3072), "timeout": nearly(5), "binary_data_output": nearly(True)}
)
pixels = st.fixed_dictionaries(
    {},
    optional={
        "name": nearly("pixels"),
        "datatype": nearly("UINT8"),
        "shape": nearly([1, 3, 32, 32]),
        "data": nearly([0] * 3072),
        "parameters": parameters | anything,
    },
)
images = st.fixed_dictionaries(
    {},
    optional={
        "name": nearly("image"),
        "datatype": nearly("BYTES"),
        "shape": nearly([2]),
        "data": nearly(["AAAA", ""]),
        "parameters": parameters | anything,
    },
)
outputs = st.fixed_dictionaries(
    {},
    optional={
        "name": nearly("probabilities"),
        "parameters": st.fixed_dictionaries({}, optional={"classification": nearly(2), "binary_data": nearly(True)}) | anything,
    },
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "id": nearly("42"),
        "inputs": st.lists(pixels | images | anything, max_size=2) | anything,
        "outputs": st.lists(outputs | anything, max_size=2) | anything,
        "parameters": parameters | anything,
    },
)


@given(documents | anything, st.binary(max_size=40) | st.just(bytes(3072)), st.integers(-2, 2) | st.none())
def test_every_request_is_read_or_refused(document: Any, binary: bytes, error: int | None) -> None:
    """Nothing but a refusal of the client's mistake comes out, and what is read fits the model."""
    text = json.dumps(document).encode()
    length = None if error is None else str(len(text) + error).encode()
    try:
        request, images = read_request(text + binary, length, MODEL, 4)
    except (MalformedRequest, InvalidParameter):
        return
    assert 1 <= len(images) <= 4
    assert not isinstance(images, np.ndarray) or images.shape[1:] == (3, 32, 32)
    assert [output.name for output in requested_outputs(request, MODEL)] == ["probabilities"]


@given(st.binary(max_size=200), st.none() | st.binary(max_size=4))
def test_every_body_is_read_or_refused(body: bytes, header_length: bytes | None) -> None:
    """Also when it is no JSON at all."""
    with contextlib.suppress(MalformedRequest):
        read_request(body, header_length, MODEL, 4)


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5))
def test_bytes_are_read_as_they_were_written(elements: list[bytes]) -> None:
    """Lengths and order survive the binary form, empty elements included."""
    data = memoryview(write_bytes(elements))
    assert [bytes(element) for element in read_images(data, len(elements))] == elements


@given(st.lists(st.integers(0, 255), min_size=12, max_size=12))
def test_pixels_are_the_same_in_every_form(values: list[int]) -> None:
    """Binary, flat JSON and nested JSON give the identical array."""
    shape = (2, 2, 3)
    array = np.array(values, np.uint8).reshape(shape)
    for data in (memoryview(array.tobytes()), values, array.tolist()):
        assert np.array_equal(read_pixels(data, shape), array)
