"""``python -m service predict``: classify files from the command line, by a running service or in this process."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Never, TextIO

from service.answers import OptionArguments, check_top_k, make_options
from service.errors import ServiceError
from service.model.checkpoint import CheckpointError
from service.model.formats import IMAGE_SUFFIXES
from service.predict.file_classifier import CannotBegin, by_model, by_service
from service.predict.output import Write, csv_rows, json_lines, printable, table
from service.runtime.runner import RunnerError
from service.schemas import Answer
from service.settings import SettingsError
from service.stop_signals import stop_signals

if TYPE_CHECKING:
    from tqdm import tqdm

EXIT_FAILED = 1  # a file has no answer
EXIT_CANNOT_BEGIN = 2
EXIT_INTERRUPTED = 130  # 128 and SIGINT, as shells count

_DEFAULT_TOP_K = 3


def predict_files(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when every file has an answer, 1 when one has none, 2 when nothing began."""
    options = _parse(arguments)
    try:
        return _run(options)
    except (CannotBegin, SettingsError, CheckpointError, RunnerError, ServiceError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CANNOT_BEGIN
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who reads along has seen enough; nothing must be flushed to it on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def image_files(named: Iterable[Path]) -> Iterator[Path]:
    """Yield each file as named, and for a folder every image in it and below it, sorted; an image is known by its suffix.

    A folder without any image is yielded itself, so that reading it fails.
    """
    for path in named:
        below = sorted(path.rglob("*")) if path.is_dir() else []
        yield from [file for file in below if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()] or [path]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m service predict",
        description="Classify image files, by the service at --url or, without it, by the model in this process."
        " That one takes its settings from the environment, as the service does: SERVICE_CHECKPOINT, SERVICE_RUNTIME, ...",
        epilog="The exit status is 0 when every file has an answer, 1 when one has none, 2 when nothing could begin.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="an image, or a folder with images")
    parser.add_argument("--url", help="address of a running service, such as http://localhost:8000")
    parser.add_argument("--api-key", metavar="KEY", help="key for that service; without it, what SERVICE_API_KEY holds")
    parser.add_argument(
        "--top-k", metavar="N", type=int, help=f"how many classes to show, best first; {_DEFAULT_TOP_K} as it is"
    )
    parser.add_argument(
        "--unknown", choices=("flag", "reject"), help="reject: an image that is not known has no label; flag as it is"
    )
    parser.add_argument(
        "--threshold",
        metavar="P",
        type=float,
        help="an image of a smaller typicality is not known; 0 to 1, the model's own as it is",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object a line instead of a table")
    parser.add_argument("--csv", metavar="OUT", type=Path, help="write a CSV file, and no table")
    options = parser.parse_args(arguments)
    if options.api_key is None:
        options.api_key = os.environ.get("SERVICE_API_KEY", "")
    elif options.url is None:
        parser.error("--api-key is for the service at --url, and there is none")
    return options


def _run(options: argparse.Namespace) -> int:
    paths = list(image_files(options.files))
    with contextlib.ExitStack() as stack:
        opening = by_model(len(paths)) if options.url is None else by_service(options.url, options.api_key)
        classifier = stack.enter_context(opening)
        check_top_k(options.top_k, len(classifier.class_names))
        top_k = min(options.top_k or _DEFAULT_TOP_K, len(classifier.class_names))
        chosen = OptionArguments(top_k=top_k, unknown=options.unknown, threshold=options.threshold)
        make_options(**chosen)
        writers: list[Write] = []
        if options.csv is not None:
            writers.append(csv_rows(stack.enter_context(_open_csv(options.csv)), top_k))
        if options.json:
            writers.append(json_lines(sys.stdout))
        if not writers:
            writers.append(stack.enter_context(table(sys.stdout)))
        # Lines that appear one by one on the same terminal are progress enough.
        bar = None if len(paths) == 1 or (options.json and sys.stdout.isatty()) else _open_bar(len(paths))
        if bar is not None:
            stack.callback(bar.close)
        stop = stack.enter_context(stop_signals(*_interrupts(), second="default"))
        failed = 0
        for path, result in classifier.classify(paths, chosen):
            if stop.requested:
                raise KeyboardInterrupt
            if not isinstance(result, Answer):
                failed += 1
                line = printable(f"{path}: {result.detail}")
                if bar is None:
                    sys.stderr.write(f"{line}\n")
                else:
                    bar.write(line, file=sys.stderr)
            for write in writers:
                write(path, result)
            if bar is not None:
                bar.update()
    sys.stdout.flush()
    if failed:
        sys.stderr.write(f"{failed} of {len(paths)} files have no answer\n")
    return EXIT_FAILED if failed else 0


def _interrupts() -> list[signal.Signals]:
    """Signals that stop it between two files; none where a caller ignores or handles interrupts itself.

    Raised where it comes, an interrupt could leave a lock of a thread held, and the end would wait for that thread for ever.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return [signal.SIGINT] if ours and threading.current_thread() is threading.main_thread() else []


def _open_csv(path: Path) -> TextIO:
    try:  # names that are no text are written as they are
        return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise CannotBegin(f"cannot write {path}: {error.strerror or error}") from error


def _open_bar(total: int) -> tqdm[Never] | None:
    """Show progress on a terminal, where tqdm is installed; the client extra brings it."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, unit="image", disable=None, leave=False, file=sys.stderr)
