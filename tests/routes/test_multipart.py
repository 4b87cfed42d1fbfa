"""Forms as RFC 2046 and RFC 7578 allow them, and as clients send them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import MalformedRequest
from service.routes.uploads import Upload, parse_form

BOUNDARY = b"----d74496d6"
TYPE = b"multipart/form-data; boundary=" + BOUNDARY
DISPOSITION = b'Content-Disposition: form-data; name="file"'


def parse(body: bytes, content_type: bytes = TYPE) -> list[Upload]:
    return parse_form(body, content_type, max_parts=4)


def part(head: bytes, data: bytes) -> bytes:
    """One part behind its delimiter."""
    return b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


@pytest.mark.parametrize(
    ("head", "name", "filename"),
    [
        (b'Content-Disposition: form-data; name="a"', "a", None),
        ('Content-Disposition: form-data; name="a"; filename="my cat é.png"'.encode(), "a", "my cat é.png"),
        (b'Content-Disposition: form-data; name="a"; filename="x"\r\nContent-Type: image/png', "a", "x"),
        (b'Content-Type: image/png\r\nContent-Disposition: form-data; name="a"; filename="x"', "a", "x"),
        (b'CONTENT-DISPOSITION:form-data;NAME=a;FileName="b;c=d.png"', "a", "b;c=d.png"),
        (b'content-disposition : form-data; name=file;\r\n filename="folded.png"', "file", "folded.png"),
        (b'Content-Disposition: form-data; name="a"; filename="say \\"hi\\".png"', "a", 'say "hi".png'),
        (b'Content-Disposition: form-data; name="a"; filename="C:\\cats\\tom.png"', "a", "C:\\cats\\tom.png"),
        (b"Content-Disposition: form-data; name=file; filename=b.png; filename*=utf-8''caf%C3%A9.png", "file", "café.png"),
        (b"Content-Disposition: form-data; name=file; filename*=ISO-8859-1'en'%A3.png", "file", "£.png"),
        (b"Content-Disposition: form-data; name=file; filename=b.png; filename*=utf-7''%C3", "file", "b.png"),
        (b'Content-Disposition: form-data; name="a"; filename="never closed', "a", "never closed"),
        (b'Content-Disposition: form-data; name=""; filename=""', "", ""),
    ],
)
def test_headers_of_a_part(head: bytes, name: str, filename: str | None) -> None:
    """Any case and order, folded, quoted or not, with either name of the file."""
    data = bytes(range(256))
    assert parse(form(part(head, data))) == [Upload(data, filename, name)]


@pytest.mark.parametrize(
    "body",
    [
        form(part(DISPOSITION, b"data")),
        b"\r\n" + form(part(DISPOSITION, b"data")),
        b"This is a message in MIME.\r\n" + form(part(DISPOSITION, b"data")),
        form(part(DISPOSITION, b"data")) + b"epilogue\r\n--" + BOUNDARY + b"\r\n",
        form(part(DISPOSITION, b"data")).removesuffix(b"\r\n"),
        form(part(DISPOSITION, b"data")).replace(BOUNDARY + b"\r\n", BOUNDARY + b" \t \r\n"),
        form(part(DISPOSITION, b"data")).replace(BOUNDARY + b"--", BOUNDARY + b"-- \t"),
    ],
    ids=["plain", "line before", "preamble", "epilogue", "no line end", "padding", "padding at the end"],
)
def test_what_is_around_the_parts_is_ignored(body: bytes) -> None:
    """RFC 2046, section 5.1.1."""
    assert parse(body) == [Upload(b"data")]


@pytest.mark.parametrize(
    "content_type",
    [
        b'multipart/form-data; boundary="' + BOUNDARY + b'"',
        b"multipart/form-data;boundary=" + BOUNDARY + b"; charset=utf-8",
        b"Multipart/Form-Data; charset=utf-8; BOUNDARY=" + BOUNDARY,
    ],
)
def test_spellings_of_the_content_type(content_type: bytes) -> None:
    """The boundary is found, quoted or not, wherever it is."""
    assert parse(form(part(DISPOSITION, b"data")), content_type) == [Upload(b"data")]


SAMPLES = st.binary(max_size=60) | st.sampled_from([b"\r\n", b"\r\n--", b" --" + BOUNDARY, b"\r"])


@given(st.lists(SAMPLES.filter(lambda data: b"\r\n--" + BOUNDARY not in b"\r\n" + data), max_size=4))
def test_every_byte_of_the_data_is_kept(chunks: list[bytes]) -> None:
    """Whatever the parts hold, in the order sent."""
    assert parse(form(*(part(DISPOSITION, data) for data in chunks))) == [Upload(data) for data in chunks]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no form",
        part(DISPOSITION, b"data"),
        part(DISPOSITION, b"data") + b"--" + BOUNDARY,
        b"--" + BOUNDARY + b"\r\n" + DISPOSITION + b"\r\n\r\ndata",
        b"--" + BOUNDARY + b"\r\n" + form(part(DISPOSITION, b"data")),
        b"--" + BOUNDARY + b"x\r\n" + DISPOSITION + b"\r\n\r\ndata\r\n--" + BOUNDARY + b"--",
        form(part(b"Content-Disposition: form-data", b"data")),
        form(part(b"X-Name: name=file", b"data")),
        form(part(b"X: " + b"x" * 9000 + b"\r\n" + DISPOSITION, b"data")),
        form(*[part(DISPOSITION, b"data")] * 5),
    ],
)
def test_a_broken_form_is_refused(body: bytes) -> None:
    """Cut short, without names, with too many parts or too long headers."""
    with pytest.raises(MalformedRequest):
        parse(body)


@pytest.mark.parametrize("boundary", [b"", b'""', b"b" * 71, b"b" * 20_000])
def test_a_boundary_has_1_to_70_bytes(boundary: bytes) -> None:
    """Whatever the body."""
    with pytest.raises(MalformedRequest, match="1 to 70 bytes"):
        parse(form(part(DISPOSITION, b"data")), b"multipart/form-data; boundary=" + boundary)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_garbage_is_parts_or_a_refusal(body: bytes, cut: bytes) -> None:
    """Bytes that are no form, and a sound one with something in its middle."""
    sound = form(part(DISPOSITION, b"data"))
    for garbage in (body, sound[: len(cut)] + cut + sound[len(cut) :]):
        try:
            parse(garbage)
        except MalformedRequest:
            continue
