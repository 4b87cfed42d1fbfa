"""Closed-loop load by wrk: a number of connections, each with one request on its way.

Owns: the requests, wrk's command and its output. Does not know: the servers.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

_SCRIPT = """
local requests = {{}}
for index = 1, {count} do
  local file = io.open(string.format("{folder}/%d", index), "rb")
  requests[index] = file:read("*all")
  file:close()
end
local next_request = 0
request = function()
  next_request = next_request % {count} + 1
  return requests[next_request]
end
done = function(summary, latency)
  io.write(string.format(
    '{{"requests": %d, "duration_s": %f, "p50_ms": %f, "p99_ms": %f, "refused": %d, "broken": %d}}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class LoadResult:
    """``p50_ms`` and ``p99_ms`` are of all answers; ``refused`` counts those of 4xx or 5xx, ``broken`` what got none."""

    connections: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    refused: int
    broken: int

    @property
    def errors(self) -> int:
        """How many did not go well, one way or the other."""
        return self.refused + self.broken


def multipart_request(path: str, image: bytes) -> bytes:
    """Make the whole HTTP request of one form upload, as curl sends it."""
    boundary = b"------------------------d74496d66958873e"
    body = (
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="file"; filename="image.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n--" + boundary + b"--\r\n"
    )
    return http_request(path, b"multipart/form-data; boundary=" + boundary, body)


def raw_request(path: str, image: bytes) -> bytes:
    """Make the whole HTTP request whose body is the image."""
    return http_request(path, b"image/jpeg", image)


def pixels_request(model: str, count: int) -> bytes:
    """Make the whole HTTP request of ``count`` images as the network takes them, to the model of that name at /v2."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "pixels",
                    "shape": pixels.shape,
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": pixels.nbytes},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = f"Inference-Header-Content-Length: {len(head)}\r\n".encode()
    return http_request(f"/v2/models/{model}/infer", b"application/octet-stream", head + pixels.tobytes(), headers)


def http_request(path: str, content_type: bytes, body: bytes, headers: bytes = b"") -> bytes:
    """Make a whole POST request; each line of ``headers`` ends with CR LF."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nContent-Type: "
    return head.encode() + content_type + b"\r\n" + headers + b"\r\n" + body


def run_wrk(url: str, requests: list[bytes], *, connections: int, duration_s: int, threads: int = 1) -> LoadResult:
    """Send ``requests`` in turn over that many connections for that long."""
    parts = urlsplit(url)
    with tempfile.TemporaryDirectory() as folder:
        for index, request in enumerate(requests, 1):
            (Path(folder) / str(index)).write_bytes(request)
        script = Path(folder) / "load.lua"
        script.write_text(_SCRIPT.format(count=len(requests), folder=folder))
        command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{duration_s}s", "--timeout", "30s", "-s", str(script)]
        done = subprocess.run([*command, f"http://{parts.netloc}/"], capture_output=True, text=True, check=True)
    found = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"wrk said nothing that can be read:\n{done.stdout}{done.stderr}")
    told = json.loads(found[0])
    duration_s = told.pop("duration_s")
    return LoadResult(connections=connections, requests_per_s=told["requests"] / duration_s, **told)
