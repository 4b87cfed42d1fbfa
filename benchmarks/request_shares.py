"""``python -m benchmarks.request_shares``: where the processor time of a request to ``/predict`` goes.

It is of the running service under load, from the scheduler's own clock.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mode

from benchmarks.load.closed_loop import run_wrk
from benchmarks.load.uploads import UPLOADS, form_request
from benchmarks.report import as_markdown
from benchmarks.servers.footprint import children_cpu_s, thread_cpu_s
from benchmarks.servers.machine import describe_machine
from benchmarks.servers.server_process import ServerProcess, exit_on_signals
from benchmarks.servers.servers import start_server
from service.cpu import available_cores
from service.settings import DEFAULT_CHECKPOINT

CONNECTIONS = (1, 16, 64, 256)
HEAD = ["connections", "requests/s", "engine: the model's threads", "engine: its event loop", "workers: event loops"]
HEAD += ["workers: decode threads", "wrk", "cores in use"]


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.request_shares", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--upload", choices=UPLOADS, default="small", help="32x32, 640x480 (60 kB) or 12-megapixel JPEG (1 MB)")
    parser.add_argument("--seconds", type=float, default=6, help="of each load")
    options = parser.parse_args()
    exit_on_signals()
    requests = [form_request("/predict", image) for image in UPLOADS[options.upload]()]
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), end="\n\n")
    with start_server("ours", options.checkpoint) as server:
        rows = [shares_row(server, requests, connections, options.seconds) for connections in CONNECTIONS]
    print(as_markdown(HEAD, rows))
    return 0


def shares_row(server: ServerProcess, requests: list[bytes], connections: int, seconds: float) -> list[str]:
    """Load the service and return a cell for each of ``HEAD``: the processor time of a request by the threads that took it."""
    run_wrk(server.url, requests, connections=connections, duration_s=seconds / 3)
    before, wrk_before = thread_cpu_s(server.pid), children_cpu_s()
    result = run_wrk(server.url, requests, connections=connections, duration_s=seconds)
    after, wrk_s = thread_cpu_s(server.pid), children_cpu_s() - wrk_before
    took = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
    engine = mode(process for process, _ in took)  # nobody else has threads of a model
    model_s = sum(s for (process, thread), s in took.items() if process == engine and thread != engine)
    loop_s = took[engine, engine]
    decode_s = sum(s for (process, thread), s in took.items() if process not in (engine, thread))
    workers_s = sum(took.values()) - model_s - loop_s - decode_s
    parts = (model_s, loop_s, workers_s, decode_s, wrk_s)
    times = [f"{part / max(1, result.requests) * 1e6:,.0f} µs" for part in parts]
    cores = f"{sum(parts) / result.duration_s:.2f} of {available_cores()}"
    return [str(connections), f"{result.answered_per_s:,.0f}", *times, cores]


if __name__ == "__main__":
    sys.exit(main())
