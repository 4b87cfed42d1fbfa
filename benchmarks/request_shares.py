"""``python -m benchmarks.request_shares``: where the processor time of a request to ``/predict`` goes, and what its parts need.

Owns: the service's threads by what they do, and the steps of a request timed by themselves. Does not know: other servers.

The first table is of the running service under load, from the scheduler's own clock. The second times steps in a loop that
does nothing else, so that code and data stay in the cache: in the service, between two batches of the model, the same steps
take about twice as long.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.load.closed_loop import run_wrk
from benchmarks.load.uploads import form_request, small_jpegs
from benchmarks.parts import seconds_of, time_model
from benchmarks.servers.footprint import thread_cpu_s
from benchmarks.servers.machine import describe_machine
from benchmarks.servers.server_process import ServerProcess, exit_on_signals
from benchmarks.servers.servers import start_server
from service.answers import DEFAULT_OPTIONS
from service.cpu import available_cores
from service.engine.interface import ModelInfo, Prediction
from service.model.checkpoint import load_checkpoint
from service.model.images import EncodedImage
from service.observability.metrics import FIRST_WORKER, Metrics, make_values
from service.observability.request_record import Answered, RequestRecord, Scope, make_request_id
from service.routes.classification import Classification
from service.routes.predict import write_answer
from service.routes.uploads import one_upload
from service.settings import DEFAULT_CHECKPOINT

CONNECTIONS = (1, 16, 64, 256)


def main() -> int:
    """Print both tables; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.request_shares", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--seconds", type=int, default=6, help="of each load")
    options = parser.parse_args()
    exit_on_signals()
    images = small_jpegs()
    requests = [form_request("/predict", image) for image in images]
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), end="\n\n")
    print("| connections | requests/s | engine: the model's threads | engine: its event loop | workers | wrk | cores in use |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with start_server("ours", options.checkpoint) as server:
        for connections in CONNECTIONS:
            print(shares_row(server, requests, connections, options.seconds), flush=True)
    print("\n| step of a request, by itself | µs |\n| --- | ---: |")
    for name, microseconds in step_times(options.checkpoint, requests[0]).items():
        print(f"| {name} | {microseconds:.1f} |", flush=True)
    return 0


def shares_row(server: ServerProcess, requests: list[bytes], connections: int, seconds: int) -> str:
    """Load the service and give the processor time of a request by the threads that took it."""
    run_wrk(server.url, requests, connections=connections, duration_s=max(2, seconds // 3))
    before, wrk_before = thread_cpu_s(server.pid), _children_cpu_s()
    result = run_wrk(server.url, requests, connections=connections, duration_s=seconds)
    after, wrk_s = thread_cpu_s(server.pid), _children_cpu_s() - wrk_before
    took = {thread: after[thread] - before.get(thread, 0.0) for thread in after}
    threads_of: dict[int, int] = {}
    for process, _ in took:
        threads_of[process] = threads_of.get(process, 0) + 1
    engine = max(threads_of, key=threads_of.__getitem__)  # nobody else has threads of a model
    model_s = sum(s for (process, thread), s in took.items() if process == engine and thread != engine)
    loop_s = took[engine, engine]
    others_s = sum(took.values()) - model_s - loop_s
    cells = [f"{part / result.requests * 1e6:,.0f} µs" for part in (model_s, loop_s, others_s, wrk_s)]
    cores = (model_s + loop_s + others_s + wrk_s) / seconds
    return f"| {connections} | {result.requests_per_s:,.0f} | {' | '.join(cells)} | {cores:.2f} of {available_cores()} |"


def step_times(path: Path, request: bytes) -> dict[str, float]:
    """Time each step in microseconds; the model's are of one image on one core."""
    checkpoint = load_checkpoint(path)
    metadata = checkpoint.metadata
    model = ModelInfo(metadata.name, checkpoint.version, metadata.class_names, metadata.input)
    rates = time_model(checkpoint, runtime="openvino", precision="auto", threads=1)
    steps = {f"the model, one image of a batch of {batch}": 1e6 / rate for batch, rate in rates.items()}

    head, _, body = request.partition(b"\r\n\r\n")
    content_type = next(line.partition(b": ")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-type"))
    image = one_upload(body, content_type).data
    classes = len(metadata.class_names)
    prediction = Prediction(np.full((1, classes), 1 / classes, np.float32), model, 0.001, 0.001, 8)
    done = Classification(prediction, 0.0001)
    metrics = Metrics(make_values(workers=1), FIRST_WORKER)
    metrics.name_routes(["/predict"])
    record = RequestRecord(Scope("POST", "/predict"))
    record.route, record.status = "/predict", 200
    record.answered.append(Answered(0.0, 0.0001, prediction))
    work: dict[str, Callable[[], object]] = {
        "cutting the form": lambda: one_upload(body, content_type),
        "the image's header": lambda: EncodedImage(image),
        "decoding": lambda: EncodedImage(image).decode(metadata.input),
        "a request id": make_request_id,
        "the answer's JSON": lambda: write_answer(prediction, DEFAULT_OPTIONS, "image.jpg"),
        "timing headers": done.headers,
        "metrics": lambda: metrics.observe_request(record),
    }
    return steps | {name: seconds_of(step) * 1e6 for name, step in work.items()}


def _children_cpu_s() -> float:
    """Processor seconds of the children that have ended, every ``wrk`` so far among them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
