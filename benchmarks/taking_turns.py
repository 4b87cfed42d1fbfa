"""``python -m benchmarks.taking_turns A B``: compare servers by turns, for differences smaller than the machine's drift.

All servers run the whole time. The load goes to one after the other for a few seconds, in an order that is reversed with each
round. A contender is a name of ``benchmarks.servers.servers``, or the folder of another checkout whose own service is started.
Either may be followed by settings, as in ``ours,SERVICE_MAX_BATCH_SIZE=128``. ``--header`` is sent with every request to every
contender. ``--untrained`` has all of them serve random weights of another architecture; ``--no-typicality`` adds a contender
that serves the same checkpoint without its typicality. One start of a server may be 5 % faster than the next: with ``--starts``
all are started so often, and the rounds of all starts count.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks.load.closed_loop import LoadResult, run_wrk
from benchmarks.load.uploads import UPLOADS, form_request, parse_headers, pixels_request, raw_request
from benchmarks.report import as_markdown
from benchmarks.servers.footprint import children_cpu_s, group_cpu_s
from benchmarks.servers.machine import describe_machine
from benchmarks.servers.server_process import ServerProcess, exit_on_signals
from benchmarks.servers.servers import SERVERS, start_server
from service.cpu import available_cores
from service.model.architectures import MODELS
from service.model.checkpoint import Calibration, CheckpointMetadata, load_checkpoint, save_checkpoint
from service.settings import DEFAULT_CHECKPOINT
from training.evaluation.calibrate import activation_ranges
from training.step.network import build_model, weights_of

HEAD = ["connections", "server", "requests/s", "to the first", "half of the rounds within", "p50", "p99", "failed"]
HEAD += ["server CPU a request", "cores in use"]  # the latter with the load's
_THREADS = max(1, available_cores() // 4)  # of wrk
_POLL_S, _IDLE_S, _SETTLE_S = 0.1, 0.03, 5.0


@dataclass(frozen=True)
class Turn:
    """One load of one server, and the processor seconds of the server and of the load itself."""

    load: LoadResult
    server_cpu_s: float
    load_cpu_s: float

    @property
    def rate(self) -> float:
        """Requests a second that succeeded."""
        return self.load.answered_per_s

    @property
    def cores(self) -> float:
        """Cores in use, by the server and by the load."""
        return (self.server_cpu_s + self.load_cpu_s) / self.load.duration_s


@dataclass
class Contender:
    """One server and its turns, for each number of connections."""

    name: str
    server: ServerProcess
    requests: list[bytes]
    turns: defaultdict[int, list[Turn]] = field(default_factory=lambda: defaultdict(list))

    def median(self, connections: int, figure: Callable[[Turn], float]) -> float:
        """Median of a figure over the turns with that many connections."""
        return median(map(figure, self.turns[connections]))

    def ratios_to(self, other: Contender, connections: int) -> list[float]:
        """Ratios of the rates in each round, ascending; a server that never answered counts as having done so once."""
        pairs = zip(self.turns[connections], other.turns[connections], strict=True)
        return sorted(turn.rate / max(others.rate, 1 / others.load.duration_s) for turn, others in pairs)


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.taking_turns", description=__doc__)
    parser.add_argument("contenders", nargs="+", metavar="A", help=f"a folder, or one of: {', '.join(SERVERS)}")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--untrained", choices=MODELS, help="random weights of this architecture in place of the checkpoint")
    parser.add_argument("--no-typicality", action="store_true", help="compare with the checkpoint without it")
    parser.add_argument("--upload", choices=UPLOADS, default="small", help="32x32, 640x480 (60 kB) or 12-megapixel JPEG (1 MB)")
    parser.add_argument("--header", nargs="*", default=[], metavar="NAME:VALUE", help="such as 'X-API-Key: secret'")
    parser.add_argument("--pixels", type=int, help="images a request, as the network takes them, to this service's /v2")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--starts", type=int, default=1, help="of each server")
    parser.add_argument("--rounds", type=int, default=8, help="after each start")
    parser.add_argument("--seconds", type=float, default=2, help="of each turn")
    options = parser.parse_args()
    exit_on_signals()
    images, headers = UPLOADS[options.upload](), parse_headers(options.header)
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), end="\n\n")
    with contextlib.ExitStack() as stack:
        checkpoint = options.checkpoint
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.untrained:
            checkpoint = folder / "untrained.safetensors"
            save_untrained(checkpoint, options.untrained)
        if options.no_typicality:
            whole, plain = load_checkpoint(checkpoint), folder / "plain.safetensors"
            save_checkpoint(plain, whole.weights, whole.metadata, canary=whole.canary)
            options.contenders.append(f"ours,SERVICE_CHECKPOINT={plain}")
        turns = [defaultdict[int, list[Turn]](list) for _ in options.contenders]
        for _ in range(options.starts):
            with contextlib.ExitStack() as servers:
                opened = (open_contender(servers, name, checkpoint, images, headers) for name in options.contenders)
                contenders = [replace(one, turns=its) for one, its in zip(opened, turns, strict=True)]
                for contender in contenders if options.pixels else ():
                    contender.requests = [pixels_request(load_checkpoint(checkpoint).metadata.name, options.pixels)]
                for connections in options.connections:
                    run_rounds(contenders, connections, options.rounds, options.seconds)
    print(as_markdown(HEAD, table_rows(contenders, options.connections)))
    return 0


def save_untrained(path: Path, architecture: str) -> None:
    """Write a checkpoint of random weights with an int8 form."""
    config, spec = MODELS[architecture].config, MODELS[architecture].input
    model = build_model(architecture, config)
    images = torch.randint(0, 256, (8, 3, spec.size, spec.size), dtype=torch.uint8)
    metadata = CheckpointMetadata(
        name="untrained",
        architecture=architecture,
        config=config,
        class_names=tuple(f"class {index}" for index in range(config.num_classes)),
        input=spec,
        calibration=Calibration(activation_max=activation_ranges(model, images, spec)),
    )
    save_checkpoint(path, weights_of(model), metadata)


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


def run_rounds(contenders: list[Contender], connections: int, rounds: int, seconds: float) -> None:
    """Load each contender once a round, after a third of a turn to warm up."""
    for contender in contenders:
        take_turn(contender, connections, seconds / 3)
    for number in range(rounds):
        for contender in contenders[:: -1 if number % 2 else 1]:
            contender.turns[connections].append(take_turn(contender, connections, seconds))


def take_turn(contender: Contender, connections: int, seconds: float) -> Turn:
    """Load one server, the others being idle, and wait until it has finished what was left unanswered."""
    group, load_before = contender.server.pid, children_cpu_s()
    before = group_cpu_s(group)
    load = run_wrk(contender.server.url, contender.requests, connections=connections, duration_s=seconds, threads=_THREADS)
    after = group_cpu_s(group)
    turn = Turn(load, after - before, children_cpu_s() - load_before)
    limit, now = time.monotonic() + _SETTLE_S, 0.0
    while time.monotonic() < limit and (now := group_cpu_s(group)) - after > _IDLE_S:
        after = now
        time.sleep(_POLL_S)
    return turn


def table_rows(contenders: list[Contender], loads: Iterable[int]) -> list[list[str]]:
    """Return the cells of ``HEAD``: medians of the rounds; ratios are to the first contender in the same round."""
    rows = []
    for connections, one in product(loads, contenders):
        middle, ratios = partial(one.median, connections), one.ratios_to(contenders[0], connections)
        quarter = len(ratios) // 4
        cells = [str(connections), one.name, f"{middle(lambda turn: turn.rate):,.0f}", f"{median(ratios):.3f}"]
        cells += [f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}"]
        cells += [f"{middle(lambda turn: turn.load.p50_ms):.1f} ms", f"{middle(lambda turn: turn.load.p99_ms):.1f} ms"]
        cells += [str(sum(turn.load.refused + turn.load.broken for turn in one.turns[connections]))]
        cells += [f"{middle(lambda turn: turn.server_cpu_s / max(1, turn.load.requests) * 1e6):,.0f} µs"]
        rows.append([*cells, f"{middle(lambda turn: turn.cores):.2f}"])
    return rows


if __name__ == "__main__":
    sys.exit(main())
