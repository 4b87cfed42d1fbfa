"""``python -m benchmarks.resilience.chaos``: every fault against the real service under load; a table, and the promises.

The exit status is 1 when anything was lost that must not be, or a promise was broken. Where it may, it runs before all else on
the machine, so that others do not make health late.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.load.steady_load import Sample
from benchmarks.load.uploads import SAMPLES
from benchmarks.resilience import clients, faults  # noqa: F401  # they fill FAULTS
from benchmarks.resilience.scene import FAULTS, Ground, Outcome
from benchmarks.servers.machine import describe_machine
from benchmarks.servers.server_process import exit_on_signals
from service import Classifier
from service.model.checkpoint import Checkpoint, load_checkpoint
from service.settings import DEFAULT_CHECKPOINT

_HEADER = """| fault | sent | answered | refused properly | lost | ready again after | seen |
| --- | ---: | ---: | ---: | ---: | ---: | --- |"""


def main() -> int:
    """Do every fault that was asked for, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resilience.chaos", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), metavar="PART", help="those whose names contain any of it")
    parser.add_argument("--out", type=Path, help="a Markdown file for table and promises")
    options = parser.parse_args()
    exit_on_signals()
    with contextlib.suppress(PermissionError):
        os.nice(-19)
    chosen = [name for name in FAULTS if any(part.lower() in name.lower() for part in options.faults)]
    outcomes: dict[str, Outcome] = {}
    print(_HEADER, flush=True)
    with Classifier(options.checkpoint) as classifier:
        samples = [Sample(path.read_bytes(), classifier.predict(path).label or "") for path in SAMPLES]
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for name in chosen:
            outcomes[name] = run_fault(name, Ground(options.checkpoint, samples, Path(folder)))
            print(as_row(name, outcomes[name]), flush=True)
    if options.out:
        options.out.write_text(as_page(outcomes, load_checkpoint(options.checkpoint)))
    failures = [f"{name}: {failure}" for name, outcome in outcomes.items() for failure in outcome.failures]
    if failures:
        sys.stderr.write("broken promises:\n" + "".join(f"- {failure}\n" for failure in failures))
    return 1 if failures or not outcomes else 0


def run_fault(name: str, ground: Ground) -> Outcome:
    """Do one fault; one that does not come to its end is a broken promise too."""
    try:
        return asyncio.run(FAULTS[name](ground))
    except (AssertionError, TimeoutError) as error:
        return Outcome(0, 0, 0, 0, ready_again="-", failures=[f"it did not come to its end: {error}"])


def as_row(name: str, outcome: Outcome) -> str:
    """Make the fault's line of the table."""
    lost = str(outcome.lost)
    if outcome.own_connections:
        lost += f" (and {outcome.own_connections} on its own connections)"
    counts = f"{outcome.sent:,} | {outcome.answered:,} | {outcome.refused:,} | {lost}"
    seen = "; ".join([outcome.seen, *(f"**{failure.splitlines()[0]}**" for failure in outcome.failures)])
    return f"| {name} | {counts} | {outcome.ready_again} | {seen} |"


def as_page(outcomes: dict[str, Outcome], checkpoint: Checkpoint) -> str:
    """Make the whole page: how it was measured, the table, the promises."""
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    rows = "\n".join(as_row(name, outcome) for name, outcome in outcomes.items())
    promises = "\n".join(f"- **{name}.** {inspect.getdoc(FAULTS[name])}" for name in outcomes)
    return f"""# Faults

`make chaos` does each of these to the real service, over real sockets and under constant load, and writes this page.
A request is *answered* when it gets 200 with the right label for its image and its own request id; *refused properly* when
it gets 429, 503 or 504 with a problem of its own (and `Retry-After` with 429 and 503); everything else, a reset, a hang,
a wrong body, another request's answer, is *lost*. The exit status is 1 when anything is lost, or a promise below is broken.

{_HEADER}
{rows}

Measured with model {checkpoint.metadata.name} {checkpoint.version} on: {machine}.

## What each row promises

{promises}
"""


if __name__ == "__main__":
    sys.exit(main())
