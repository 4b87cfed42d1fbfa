"""Forms: the short way for a single plain part gives what the full parser gives, or leaves the form to it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import MalformedRequest
from service.web.multipart import Part, parse_form

BOUNDARY = b"----d74496d6"
SHORT = b"multipart/form-data; boundary=" + BOUNDARY
FULL = SHORT + b'; charset="utf-8"'  # a parameter that changes nothing, and that the short way does not take


def parse(content_type: bytes, body: bytes) -> list[Part] | str:
    """The parts, or the refusal in words."""
    try:
        return parse_form(body, content_type, max_parts=4)
    except MalformedRequest as error:
        return error.detail


def form(name: str, filename: str | None, data: bytes, headers: bytes = b"", end: bytes = b"--\r\n") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'.encode()
    if filename is not None:
        disposition += f'; filename="{filename}"'.encode()
    return b"--" + BOUNDARY + b"\r\n" + disposition + headers + b"\r\n\r\n" + data + b"\r\n--" + BOUNDARY + end


def test_a_plain_upload_is_cut_exactly() -> None:
    """Every byte of the data, and the names as the client wrote them."""
    data = bytes(range(256)) * 5
    assert parse(SHORT, form("file", "my cat é.png", data, b"\r\nContent-Type: image/png")) == [
        Part("file", "my cat é.png", data)
    ]


@given(
    name=st.text(max_size=8),
    filename=st.none() | st.text(max_size=12),
    data=st.binary(max_size=60) | st.sampled_from([b"\r\n", b"\r\n--", b"--" + BOUNDARY, b"\r\n--" + BOUNDARY + b"\r\n"]),
    headers=st.sampled_from(
        [b"", b"\r\nContent-Type: image/png", b"\r\nX-Other: 1\r\nContent-Type: a/b", b"\r\n folded", b"\r\nx"]
    ),
    end=st.sampled_from([b"--\r\n", b"--", b"\r\n", b"", b"--\r\nepilogue", b" --\r\n"]),
)
@example(name="file", filename="a;b=c.png", data=b"x", headers=b"", end=b"--\r\n")
@example(name="file", filename="C:\\\\cat.png", data=b"", headers=b"", end=b"--\r\n")
@example(name='fi"le', filename="", data=b"\r\n\r\n", headers=b"", end=b"--\r\n")
def test_the_short_way_agrees_with_the_parser(name: str, filename: str | None, data: bytes, headers: bytes, end: bytes) -> None:
    """Whatever the form, both ways give the same parts or the same refusal."""
    body = form(name, filename, data, headers, end)
    assert parse(SHORT, body) == parse(FULL, body)


@given(st.binary(max_size=200))
def test_garbage_gets_one_answer(body: bytes) -> None:
    """Bytes that are no form are refused alike."""
    assert parse(SHORT, body) == parse(FULL, body)


@given(cut=st.integers(0, 120), flip=st.integers(0, 119), bit=st.integers(0, 7))
def test_a_damaged_upload_gets_one_answer(cut: int, flip: int, bit: int) -> None:
    """A sound form with one bit changed and its end cut off is read alike."""
    body = bytearray(form("file", "cat.png", b"pixels", b"\r\nContent-Type: image/png"))
    body[flip % len(body)] ^= 1 << bit
    assert parse(SHORT, bytes(body[:cut])) == parse(FULL, bytes(body[:cut]))
    assert parse(SHORT, bytes(body)) == parse(FULL, bytes(body))


@pytest.mark.parametrize("content_type", [SHORT, FULL])
def test_several_parts_come_in_order(content_type: bytes) -> None:
    """Both ways lead to the parser, which gives every part."""
    first = form("a", None, b"1", end=b"\r\n")
    body = first + form("file", "x", b"2")[len(BOUNDARY) + 4 :]
    assert parse(content_type, body) == [Part("a", None, b"1"), Part("file", "x", b"2")]
