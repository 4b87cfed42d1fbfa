"""HTTP requests that are nearly right, the same ones for the same seed: image, body, headers, framing or all of it damaged."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tests.support.mutation import mutations

_MODEL = "/v2/models/resnet18-cifar10"
_BOUNDARY = b"----boundary"
_FORM = b"multipart/form-data; boundary=" + _BOUNDARY
_ODD_HEADERS = (
    b"Content-Type: multipart/form-data",
    b"Content-Type: multipart/form-data; boundary=",
    b"Content-Type: multipart/form-data; boundary=" + b"-" * 5000,
    b"Content-Type: application/json; charset=\xff",
    b"Content-Type: image/\0png",
    b"Content-Type:",
    b"Content-Encoding: gzip",
    b"Content-Encoding: deflate, gzip, br",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 7",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Inference-Header-Content-Length: -5",
    b"Inference-Header-Content-Length: 999999999999999999999999",
    b"Inference-Header-Content-Length: \xb2",
    b"X-Request-Timeout-Ms: nan",
    b"X-Request-Timeout-Ms: -0",
    b"X-Request-Timeout-Ms: 1e999",
    b"X-Request-Timeout-Ms: 0.001",
    b"X-Request-ID: " + b"x" * 5000,
    b"X-Request-ID: \xff\xfe%0d%0aSet-Cookie: a=b",
    b"traceparent: 00-" + b"f" * 32 + b"-0-0",
    b"Accept-Encoding: gzip;q=nan, *;q=1e9, deflate;q=-1",
    b"Accept: text/html;q=x, application/openmetrics-text; version=\xff",
    b"Authorization: Bearer",
    b"Expect: 100-continue",
    b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Range: bytes=9-1",
    b"If-None-Match: W/*",
    b"Host:",
    b"Origin: null",
    b": empty",
    b"no colon",
    b" folded",
)

_DEEP = "deep"
_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**63, 10**400, float("nan"), float("inf"), "", "\0", "\ud800", "9" * 5_000, _DEEP),
    *([], {}, [[]] * 900_000, [0] * 1_200_000, {str(key): key for key in range(20_000)}, ["A" * 8] * 20_000, [-1, 3, 32, 32]),
    *("FP32", "BYTES", "image", "pixels", "data:image/png;base64,", "http://localhost/", "=" * 100_000, " \n" * 500_000),
)


@dataclass(frozen=True)
class SoundRequest:
    """One request that the service answers with 200."""

    target: bytes
    body: bytes = b""
    content_type: bytes = b""
    headers: tuple[bytes, ...] = ()
    method: bytes = b"POST"

    def encode(self) -> bytes:
        """Give the bytes on the wire; the connection is to be closed after the answer."""
        return self._head(b"Content-Length: %d" % len(self.body)) + self.body

    def encode_chunked(self, sizes: list[bytes]) -> bytes:
        """Give the same in chunks of 64 bytes with these ``sizes`` in front of them, in turn; b"" for the true one."""
        pieces = [self.body[start : start + 64] for start in range(0, len(self.body), 64)]
        chunks = [
            (sizes[index % len(sizes)] or b"%x" % len(piece)) + b"\r\n" + piece + b"\r\n" for index, piece in enumerate(pieces)
        ]
        return self._head(b"Transfer-Encoding: chunked") + b"".join(chunks) + b"0\r\n\r\n"

    def _head(self, framing: bytes) -> bytes:
        kind = b"Content-Type: " + self.content_type
        lines = (
            self.method + b" " + self.target + b" HTTP/1.1",
            b"Host: x",
            kind,
            framing,
            *self.headers,
            b"Connection: close",
        )
        return b"\r\n".join(lines) + b"\r\n\r\n"


def sound_requests(image: bytes) -> list[SoundRequest]:
    """Give a request of every kind; ``image`` is a sound PNG."""
    text = base64.b64encode(image).decode()
    part = b'Content-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + image
    delimiter = b"--" + _BOUNDARY
    form = delimiter + b"\r\n" + part + b"\r\n" + delimiter + b"--\r\n"
    forms = (delimiter + b"\r\n" + part + b"\r\n") * 2 + delimiter + b"--\r\n"
    document = json.dumps({"inputs": text, "parameters": {"top_k": 3}}).encode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
    output = {"name": "probabilities", "parameters": {"classification": 3}}
    infer = json.dumps({"id": "42", "inputs": [{**tensor, "data": [text]}], "outputs": [output]}).encode()
    sized = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "parameters": {"binary_data_size": 3072}}
    header = json.dumps({"inputs": [sized], "parameters": {"binary_data_output": True}}).encode()
    element = struct.pack("<I", len(image)) + image
    encoded = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(element)}}]}).encode()
    json_length = b"Inference-Header-Content-Length: %d"
    gets = ["/", "/health", "/health/live", "/labels", "/metrics", "/openapi.json", "/v2", _MODEL, f"{_MODEL}/config"]
    return [
        SoundRequest(b"/predict?top_k=3", form, _FORM),
        SoundRequest(b"/predict", image, b"image/png"),
        SoundRequest(b"/predict", document, b"application/json"),
        SoundRequest(b"/predict", document.replace(b'"inputs": "', b'"inputs": "data:image/png;base64,'), b"application/json"),
        SoundRequest(b"/predict/batch", forms, _FORM),
        SoundRequest(b"/hf", image, b"application/octet-stream"),
        SoundRequest(b"/hf", document, b"application/json"),
        SoundRequest(b"/view", image, b"image/png"),
        SoundRequest(b"/explain?label=cat", image, b"image/png"),
        SoundRequest(f"{_MODEL}/infer".encode(), infer, b"application/json"),
        SoundRequest(f"{_MODEL}/infer".encode(), header + bytes(3072), b"", (json_length % len(header),)),
        SoundRequest(f"{_MODEL}/infer".encode(), encoded + element, b"", (json_length % len(encoded),)),
        *[SoundRequest(path.encode(), method=b"GET") for path in gets],
    ]


def requests_of_mutated_images(images: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Return ``count`` requests as bytes on the wire, sound but for their images, which are mutants of ``images``."""
    random = Random(seed)
    for image in mutations(images, count, seed, swollen=0.05):
        yield random.choice([request for request in sound_requests(image) if request.body]).encode()


def mutated_documents(requests: list[SoundRequest], count: int, seed: int) -> Iterator[bytes]:
    """Return ``count`` of the requests that begin with JSON, with values in it replaced by odd ones."""
    random = Random(seed)
    documents = [request for request in requests if request.body.startswith(b"{")]
    for _ in range(count):
        request = random.choice(documents)
        document, end = json.JSONDecoder().raw_decode(request.body.decode("latin-1"))
        for _ in range(random.randint(1, 3)):
            document = _with_odd_value(document, random)
        depth = random.choice((100, 5_000, 200_000))
        text = json.dumps(document).replace(f'"{_DEEP}"', "[" * depth + "]" * depth).encode()
        length = () if end == len(request.body) else (b"Inference-Header-Content-Length: %d" % len(text),)
        yield replace(request, body=text + request.body[end:], headers=length).encode()


def _with_odd_value(value: Any, random: Random) -> Any:
    """Replace one value somewhere in a JSON document."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return random.choice(_ODD_VALUES)
    if isinstance(value, list):
        at = random.randrange(len(value))
        return [*value[:at], _with_odd_value(value[at], random), *value[at + (random.random() < 0.8) :]]
    key = random.choice(list(value))
    return {**value, random.choice((key, key, key, "", "parameters")): _with_odd_value(value[key], random)}


def mutated_requests(requests: list[SoundRequest], count: int, seed: int, *, swollen: float = 0.0) -> Iterator[bytes]:
    """Return ``count`` damaged requests as bytes on the wire."""
    random = Random(seed)
    with_body = [request for request in requests if request.body]
    bodies = mutations([request.body for request in with_body], count, seed, swollen=swollen)
    wires = mutations([request.encode() for request in requests], count, seed + 1)
    for body, wire in zip(bodies, wires, strict=True):
        request = random.choice(with_body)
        match random.randrange(6):
            case 0:  # of any kind: a body of one kind under the type of another
                yield replace(request, body=body).encode()
            case 1:  # of its own kind
                yield replace(request, body=next(mutations([request.body], 1, random.getrandbits(32)))).encode()
            case 2:
                headers = tuple(random.choices(_ODD_HEADERS, k=random.randint(1, 3)))
                request = random.choice(requests)
                kept = request.headers if random.random() < 0.5 else ()
                yield replace(request, headers=headers + kept).encode()
            case 3:  # another request behind it, over the same connection
                yield request.encode().replace(b"Connection: close", random.choice((b"X: ", b"Connection: keep-alive"))) + wire
            case 4:
                sizes = random.choices((b"", b"0", b"40", b"41", b"-1", b"fffffffffffffffff", b"x", b"40;a=b", b" 40"), k=3)
                yield request.encode_chunked([b""] if random.random() < 0.3 else sizes)
            case _:
                yield wire
