"""Closed-loop load by wrk: a number of connections, each with one request in flight."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

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
    """Latencies are of all responses; ``refused`` counts those with 4xx or 5xx, ``broken`` the requests without one."""

    connections: int
    duration_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    refused: int
    broken: int

    @property
    def answered_per_s(self) -> float:
        """Requests a second that succeeded."""
        return (self.requests - self.refused) / self.duration_s


def run_wrk(url: str, requests: list[bytes], *, connections: int, duration_s: float, threads: int = 1) -> LoadResult:
    """Send ``requests`` one after the other over that many connections for so many whole seconds, at least 1."""
    parts = urlsplit(url)
    with tempfile.TemporaryDirectory() as folder:
        for index, request in enumerate(requests, 1):
            (Path(folder) / str(index)).write_bytes(request)
        script = Path(folder) / "load.lua"
        script.write_text(_SCRIPT.format(count=len(requests), folder=folder))
        command = ["wrk", f"--duration={max(1, round(duration_s))}s", "--timeout=30s", f"--script={script}"]
        command += [f"--threads={min(threads, connections)}", f"--connections={connections}"]
        done = subprocess.run([*command, f"http://{parts.netloc}/"], capture_output=True, text=True, check=True)
    found = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"wrk printed no figures:\n{done.stdout}{done.stderr}")
    return LoadResult(connections=connections, **json.loads(found[0]))
