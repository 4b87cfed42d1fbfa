"""``python -m benchmarks.taking_turns A B``: compare servers by turns, for differences smaller than the machine's drift.

All servers run the whole time. The load goes to one after the other for a few seconds, in an order that is reversed with each
round. A contender is a name of ``benchmarks.servers.servers``, or the folder of another checkout whose own service is started.
Either may be followed by settings, as in ``ours,SERVICE_MAX_BATCH_SIZE=128``. ``--header`` is sent with every request to every
contender. ``--widths`` has all of them serve a smaller network, to show the costs around the model.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.load.closed_loop import run_wrk
from benchmarks.load.uploads import UPLOADS, form_request, parse_headers, pixels_request, raw_request
from benchmarks.servers.footprint import group_cpu_s
from benchmarks.servers.machine import describe_machine
from benchmarks.servers.server_process import ServerProcess, exit_on_signals
from benchmarks.servers.servers import SERVERS, start_server
from service.model.architectures import ModelConfig
from service.model.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from service.model.network import build_model, config_dict, weights_of
from service.settings import DEFAULT_CHECKPOINT


@dataclass
class Contender:
    """What one server showed: for each number of connections, requests a second and processor microseconds of each turn."""

    name: str
    server: ServerProcess
    requests: list[bytes]
    rates: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    costs_us: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.taking_turns", description=__doc__)
    parser.add_argument("contenders", nargs="+", metavar="A", help=f"a folder, or one of: {', '.join(SERVERS)}")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument(
        "--widths", type=int, nargs="+", help="of the stages, of an untrained network in place of the checkpoint"
    )
    parser.add_argument("--upload", choices=UPLOADS, default="small", help="32x32, 640x480 (60 kB) or 12-megapixel JPEG (1 MB)")
    parser.add_argument("--header", nargs="*", default=[], metavar="NAME:VALUE", help="such as 'X-API-Key: secret'")
    parser.add_argument("--pixels", type=int, help="images a request, as the network takes them, to this service's /v2")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=2, help="of each turn")
    options = parser.parse_args()
    exit_on_signals()
    images, headers = UPLOADS[options.upload](), parse_headers(options.header)
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), end="\n\n")
    with contextlib.ExitStack() as stack:
        checkpoint = options.checkpoint
        if options.widths:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            checkpoint = save_untrained(folder, load_checkpoint(checkpoint).metadata, options.widths)
        contenders = [open_contender(stack, name, checkpoint, images, headers) for name in options.contenders]
        if options.pixels:
            model = load_checkpoint(checkpoint).metadata.name
            for contender in contenders:
                contender.requests = [pixels_request(model, options.pixels)]
        for connections in options.connections:
            for contender in contenders:
                take_turn(contender, connections, options.seconds)  # to warm up
            for number in range(options.rounds):
                for contender in contenders[:: -1 if number % 2 else 1]:
                    rate, cost_us = take_turn(contender, connections, options.seconds)
                    contender.rates[connections].append(rate)
                    contender.costs_us[connections].append(cost_us)
    print_table(contenders, options.connections)
    return 0


def save_untrained(folder: Path, like: CheckpointMetadata, widths: list[int]) -> Path:
    """Write a checkpoint of random weights, with ``widths`` channels and the classes of ``like``; return its path."""
    config = ModelConfig(num_classes=len(like.class_names), widths=tuple(widths), depths=(2,) * len(widths))
    metadata = CheckpointMetadata(
        name="untrained",
        architecture="resnet18",
        config=config_dict(config),
        class_names=like.class_names,
        input=like.input,
    )
    path = folder / "untrained.safetensors"
    save_checkpoint(path, weights_of(build_model(metadata.architecture, config)), metadata)
    return path


def open_contender(
    stack: contextlib.ExitStack, name: str, checkpoint: Path, images: list[bytes], headers: dict[str, str]
) -> Contender:
    """Start the server that ``name`` stands for."""
    found = re.fullmatch(r"(.*?)((?:,[A-Z_]+=[^,]*)*)", name)
    assert found is not None, "every name is one, with or without settings"
    kind, settings = found[1], found[2].split(",")[1:]
    folder = None if kind in SERVERS else Path(kind)
    if folder is not None and not (folder / "service").is_dir():
        raise SystemExit(f"{kind!r} is neither a checkout nor one of: {', '.join(SERVERS)}")
    known = "ours" if folder is not None else kind
    environment = dict(setting.split("=", 1) for setting in settings)
    server = stack.enter_context(start_server(known, checkpoint, environment, folder=folder))
    make = raw_request if SERVERS[known].raw_body else form_request
    return Contender(name, server, [make(SERVERS[known].path, image, headers=headers) for image in images])


def take_turn(contender: Contender, connections: int, seconds: int) -> tuple[float, float]:
    """Load one server, the others being idle; return requests a second and processor microseconds a request."""
    before = group_cpu_s(contender.server.pid)
    result = run_wrk(contender.server.url, contender.requests, connections=connections, duration_s=seconds)
    if result.errors:
        raise SystemExit(f"{contender.name}: {result.errors} of {result.requests} requests failed")
    return result.requests_per_s, (group_cpu_s(contender.server.pid) - before) / result.requests * 1e6


def print_table(contenders: list[Contender], loads: list[int]) -> None:
    """Medians of the rounds; ratios are to the first contender in the same round."""
    print("| connections | server | requests/s | to the first | half of the rounds within | processor time a request |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for connections in loads:
        first = contenders[0].rates[connections]
        for contender in contenders:
            rates = contender.rates[connections]
            ratios = sorted(rate / other for rate, other in zip(rates, first, strict=True))
            quarter = len(ratios) // 4
            print(
                f"| {connections} | {contender.name} | {median(rates):,.0f} | {median(ratios):.3f} "
                f"| {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} | {median(contender.costs_us[connections]):,.0f} µs |"
            )


if __name__ == "__main__":
    sys.exit(main())
