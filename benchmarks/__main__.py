"""``python -m benchmarks``: measure every target of the service on this machine and write a dated page.

With ``--quick``, print the rates beside mosec only. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from benchmarks.load.uploads import UPLOADS
from benchmarks.report import Page, as_markdown
from benchmarks.servers.server_process import exit_on_signals
from benchmarks.taking_turns import HEAD, table_rows
from benchmarks.targets import CONNECTIONS, Run, compare
from service.settings import DEFAULT_CHECKPOINT


def main() -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--quick", action="store_true", help="the rates beside mosec, in three minutes")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure the parts whose names match")
    parser.add_argument("--rounds", type=int, help="turns of each server in each load (5; quick: 2)")
    parser.add_argument("--seconds", type=float, help="of each turn (3; quick: 1), rounded for wrk")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    exit_on_signals()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rounds, seconds = options.rounds or (2 if options.quick else 5), options.seconds or (1 if options.quick else 3)
    if options.quick:
        for upload in UPLOADS:
            contenders = compare(upload, options.checkpoint, ["ours"], rounds, seconds)
            print(f"\n{upload}:\n\n{as_markdown(HEAD, table_rows(contenders, CONNECTIONS))}", flush=True)
        return 0
    page = Page(options.out, " ".join(["python -m benchmarks", *sys.argv[1:]]))
    Run(page, options.checkpoint, rounds, seconds).everything(options.only)
    print(page.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
