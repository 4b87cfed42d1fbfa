"""``python -m service predict`` as a user runs it: in this process and by the running service, for files and folders."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint
from service.predict.command import image_files, predict_files
from service.predict.output import printable
from tests.support.image_file import noise
from tests.support.scripted_server import ANSWER, LABELS, ScriptedServer, problem

_ROOT = Path(__file__).parents[2]
_WITHOUT_EXTRA = (
    "import sys; sys.modules['httpx'] = sys.modules['tqdm'] = None;"
    " sys.argv[0] = 'service'; from service.__main__ import main; sys.exit(main())"
)
# A shell that starts tests in the background has them ignore SIGINT, and their children inherit that.
_INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from service.__main__ import main; sys.exit(main())"
)


_INTERRUPTED_WITH_A_LOCK = """
import signal, sys, threading
from service.__main__ import main
from service.predict.file_classifier import FileClassifier

releases, acquire = threading.Condition.__exit__.__code__, threading.Semaphore.acquire.__code__

def interrupt(frame, event, argument):  # the pool's semaphore of idle threads: its lock is about to be let go
    held = event == "call" and frame.f_code is releases and frame.f_back.f_code is acquire
    if held and threading.active_count() > 4:  # the first have begun
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

def classify(*arguments):
    sys.setprofile(interrupt)
    return classify_as_it_is(*arguments)

signal.signal(signal.SIGINT, signal.default_int_handler)
classify_as_it_is, FileClassifier.classify = FileClassifier.classify, classify
sys.exit(main())
"""


class Command:
    """Runs the command with the checkpoint under test and no other setting of the environment."""

    def __init__(self, checkpoint: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("SERVICE_")}
        self.environment = inherited | {"SERVICE_CHECKPOINT": str(checkpoint)}

    def __call__(
        self, *arguments: object, extra: bool = True, stderr: int = subprocess.PIPE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; without ``extra``, as if the client extra were not installed."""
        start = ["-m", "service"] if extra else ["-c", _WITHOUT_EXTRA]
        return subprocess.run(
            [sys.executable, *start, "predict", *map(str, arguments)],
            cwd=_ROOT,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def command(checkpoint_path: Path) -> Command:
    return Command(checkpoint_path)


@pytest.fixture
def folder(tmp_path: Path, image_paths: list[Path]) -> Path:
    """A folder with images at two depths, one damaged, and a file that is no image by its name."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    shutil.copy(image_paths[0], folder / "b.PNG")
    shutil.copy(image_paths[1], folder / "more" / "a.png")
    (folder / "c.png").write_bytes(image_paths[2].read_bytes()[:100])
    (folder / "notes.txt").write_text("no image")
    return folder


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def label_of(path: Path) -> str:
    return path.name.split("-")[0]


def test_http_and_in_process_agree(
    command: Command, service: ServiceProcess, image_paths: list[Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """All sample images, one as TIFF, get the same labels, order, scores and model either way, in the order they were named."""
    scan = tmp_path / "scan.tif"
    with Image.open(image_paths[0]) as image:
        image.save(scan)
    image_paths = [*image_paths, scan]
    here = command("--json", "--top-k", 10, *image_paths)
    there = command("--json", "--top-k", 10, "--url", service.url, *image_paths)
    assert (here.returncode, here.stderr) == (there.returncode, there.stderr) == (0, "")
    local, remote = json_lines(here.stdout), json_lines(there.stdout)
    assert [line["file"] for line in local] == [line["file"] for line in remote] == [str(path) for path in image_paths]
    assert [line["label"] for line in local] == [line["label"] for line in remote]
    assert local[-1]["predictions"] == local[0]["predictions"]
    assert {line["model"]["version"] for line in local + remote} == {checkpoint.version}
    for mine, theirs in zip(local, remote, strict=True):
        scores = [{entry["label"]: entry["score"] for entry in line["predictions"]} for line in (mine, theirs)]
        assert len(scores[0]) == 10
        assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_a_table_for_people(command: Command, image_paths: list[Path]) -> None:
    """Without other word, aligned columns: the file, and the best classes with their scores."""
    done = command("--top-k", 2, image_paths[0], image_paths[-1])
    header, first, last = done.stdout.splitlines()
    assert header.split() == ["file", "label", "score", "known", "typicality"]
    for line, path in ((first, image_paths[0]), (last, image_paths[-1])):
        name, label, score, second, second_score, known, typicality = line.split()
        assert (name, label) == (str(path), label_of(path))
        assert line.index(f" {label} ") + 1 == header.index("label")
        assert second != label
        assert float(score) >= float(second_score)
        assert (known, 0 < float(typicality) <= 1) == ("yes", True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("way", ["in process", "over HTTP"])
def test_unreadable_files_are_reported_and_the_rest_goes_on(
    way: str, command: Command, service: ServiceProcess, image_paths: list[Path], tmp_path: Path
) -> None:
    """A missing, a damaged and an empty file each have a line on standard error and as JSON; the exit status is 1."""
    damaged, empty = tmp_path / "damaged.png", tmp_path / "empty.png"
    damaged.write_bytes(image_paths[0].read_bytes()[:100])
    empty.touch()
    files = [tmp_path / "none.png", image_paths[0], damaged, empty, image_paths[1]]
    where = [] if way == "in process" else ["--url", service.url]
    done = command("--json", *where, *files)
    assert done.returncode == 1
    lines = json_lines(done.stdout)
    assert [line["file"] for line in lines] == [str(path) for path in files]
    codes = [line["error"]["code"] if "error" in line else line["label"] for line in lines]
    assert codes == [
        "unreadable_file",
        label_of(image_paths[0]),
        "invalid_image",
        "invalid_image",
        label_of(image_paths[1]),
    ]
    *reports, total = done.stderr.splitlines()
    assert [report.partition(": ")[0] for report in reports] == [str(files[0]), str(damaged), str(empty)]
    assert total == "3 of 5 files have no answer"


def test_a_folder_is_walked_and_written_as_csv(command: Command, folder: Path, image_paths: list[Path]) -> None:
    """One row for each image in it and below, told by suffix, with its classes or its error; no table is printed."""
    out = folder / "out.csv"
    done = command(folder, "--csv", out, "--top-k", 2)
    assert (done.returncode, done.stdout) == (1, "")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["file", "label", "score", "label_2", "score_2", "known", "typicality", "error"]
    assert [row["known"] for row in rows] == ["yes", "", "yes"]
    assert [row["file"] for row in rows] == [str(folder / name) for name in ("b.PNG", "c.png", "more/a.png")]
    assert [row["label"] for row in rows] == [label_of(image_paths[0]), "", label_of(image_paths[1])]
    assert [row["error"].partition(":")[0] for row in rows] == ["", "invalid_image", ""]
    assert float(rows[0]["score"]) > float(rows[0]["score_2"]) > 0


@pytest.mark.parametrize("way", ["in process", "over HTTP"])
def test_what_is_not_known_can_be_rejected(way: str, command: Command, service: ServiceProcess, tmp_path: Path) -> None:
    """Noise has no label then, in the table, as CSV and as JSON; with a threshold of 0 everything is known."""
    path, out = tmp_path / "noise.png", tmp_path / "out.csv"
    path.write_bytes(noise())
    where = [] if way == "in process" else ["--url", service.url]
    done = command("--json", "--csv", out, "--unknown", "reject", *where, path)
    (line,) = json_lines(done.stdout)
    assert (line["label"], line["score"], line["known"], line["typicality"] < 0.01) == (None, None, False, True)
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert (row["label"], row["score"], row["known"], float(row["typicality"]) < 0.01) == ("", "", "no", True)
    assert row["label_2"]
    table = command("--unknown", "reject", "--threshold", "0", *where, path).stdout.splitlines()
    assert table[1].split()[-2] == "yes"


def test_progress_is_shown_on_a_terminal(command: Command, folder: Path) -> None:
    """A bar counts the images of a folder, and a bad file's line stands above it, whole."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    try:
        done = command(folder, stderr=terminal)
    finally:
        os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # the terminal's end, once its last line is read
        pass
    finally:
        os.close(master)
    assert done.returncode == 1
    assert b"0/3" in shown
    assert any(
        line.startswith(f"{folder / 'c.png'}: the image is damaged".encode())
        for line in shown.replace(b"\r", b"\n").split(b"\n")
    )
    assert len(done.stdout.splitlines()) == 3


def test_without_the_extra_all_but_http_works(command: Command, folder: Path, image_paths: list[Path]) -> None:
    """Neither httpx nor tqdm is needed in this process; with ``--url`` the message says what to install."""
    done = command(image_paths[0], folder, extra=False)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 4
    refused = command(image_paths[0], "--url", "http://127.0.0.1:1", extra=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "[client]" in refused.stderr


def test_the_api_key_is_a_flag_or_in_the_environment(
    image_paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either is sent, the flag first; a refusal is told as the service told it, and nothing begins."""
    answered: list[tuple[int, dict[str, str], Any]] = [(200, {}, LABELS), (200, {}, ANSWER)]
    with ScriptedServer(*answered, *answered, (401, {}, problem(401, "unauthorized"))) as server:
        ask = ("--json", "--url", server.url, str(image_paths[0]))
        monkeypatch.setenv("SERVICE_API_KEY", "environment")
        assert predict_files([*ask, "--api-key", "flag"]) == 0
        assert predict_files(ask) == 0
        monkeypatch.delenv("SERVICE_API_KEY")
        capsys.readouterr()
        assert predict_files(ask) == 2
    assert [headers.get("authorization") for _, headers in server.requests] == [
        *["Bearer flag"] * 2,
        *["Bearer environment"] * 2,
        None,
    ]
    out, errors = capsys.readouterr()
    assert out == ""
    assert "401 unauthorized" in errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "FILE"),
        (("x.png", "--top-k", "11"), "between 1 and 10"),
        (("x.png", "--top-k", "0"), "between 1 and 10"),
        (("x.png", "--top-k", "many"), "--top-k"),
        (("x.png", "--threshold", "2"), "threshold must be a number from 0 to 1"),
        (("x.png", "--api-key", "k"), "--url"),
        (("x.png", "--url", "ftp://host"), "http://localhost:8000"),
        (("x.png", "--url", "http://127.0.0.1:1"), "no answer from http://127.0.0.1:1"),
        (("x.png", "--csv", "/none/out.csv"), "cannot write /none/out.csv"),
    ],
)
def test_what_cannot_begin_is_told_in_words(
    checkpoint_path: Path,
    arguments: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 2, a message that names what is wrong, and no output."""
    monkeypatch.setenv("SERVICE_CHECKPOINT", str(checkpoint_path))
    try:
        status: object = predict_files(arguments)
    except SystemExit as error:  # argparse's own
        status = error.code
    out, errors = capsys.readouterr()
    assert (status, out) == (2, "")
    assert told in errors


def test_a_missing_checkpoint_and_a_bad_setting_are_told_in_words(command: Command, tmp_path: Path) -> None:
    """The model in this process takes the service's settings, and says what is wrong with them as the service does."""
    missing = command("x.png", SERVICE_CHECKPOINT=str(tmp_path / "none.safetensors"))
    wrong = command("x.png", SERVICE_MAX_IMAGE_PIXELS="0")
    assert (missing.returncode, wrong.returncode) == (2, 2)
    assert "there is no checkpoint" in missing.stderr
    assert "SERVICE_MAX_IMAGE_PIXELS" in wrong.stderr


def test_the_limits_of_the_settings_hold_in_process(command: Command, image_paths: list[Path]) -> None:
    """An image of more pixels than the service would take is refused here too."""
    done = command("--json", image_paths[0], SERVICE_MAX_IMAGE_PIXELS="1023")
    assert json_lines(done.stdout)[0]["error"]["code"] == "image_too_large"
    assert done.returncode == 1


def test_the_service_itself_is_helped_as_before(command: Command) -> None:
    """``python -m service --help`` lists the settings and mentions the command."""
    done = subprocess.run([sys.executable, "-m", "service", "--help"], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert "--max_batch_size" in done.stdout
    assert "python -m service predict" in done.stdout
    assert "--top-k" in command("--help").stdout


def test_a_folder_means_its_images_in_order(folder: Path, tmp_path: Path) -> None:
    """A file is taken whatever its name; a folder without images stands for itself, so that it is reported."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (folder / "d.TIF").touch()
    named = [folder / "notes.txt", empty, folder, tmp_path / "none.png"]
    found = [folder / name for name in ("b.PNG", "c.png", "d.TIF", "more/a.png")]
    assert list(image_files(named)) == [folder / "notes.txt", empty, *found, tmp_path / "none.png"]


def test_a_name_cannot_move_the_cursor(command: Command, image_paths: list[Path], tmp_path: Path) -> None:
    """What a terminal would obey is shown as a question mark; a name that is no text fails nothing, over JSON neither."""
    assert printable("a\x1b[2Jb\nc\udcff") == "a?[2Jb?c?"
    path = tmp_path / os.fsdecode(b"\x1b\xff.png")
    shutil.copy(image_paths[0], path)
    done = command(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "??.png" in done.stdout
    assert json_lines(command("--json", path).stdout)[0]["file"] == str(path)


def test_a_reader_that_has_seen_enough_ends_it_quietly(command: Command, image_paths: list[Path]) -> None:
    """``| head`` closes the pipe: no stack, no message."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service", "predict", "--json", *map(str, image_paths)],
            cwd=_ROOT,
            env=command.environment,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_ends_it_without_asking_for_the_rest(command: Command, image_paths: list[Path]) -> None:
    """SIGINT in the middle: exit status 130 and no stack, once what is on its way has been answered."""
    with ScriptedServer((200, {}, LABELS), (200, {}, ANSWER)) as server:
        server.predict_gate.clear()
        with _interruptible(command, server.url, image_paths) as process:
            try:
                for _ in range(2):  # the class names, a prediction
                    assert server.came.acquire(timeout=60)
                process.send_signal(signal.SIGINT)
                server.predict_gate.set()
                _, errors = process.communicate(timeout=60)
            finally:
                server.predict_gate.set()
                process.kill()
        assert len(server.requests) <= len(image_paths) / 2
    assert (process.returncode, errors) == (130, "")


def test_a_second_interrupt_waits_for_nothing(command: Command, image_paths: list[Path]) -> None:
    """With a service that never answers, two of them end it, as SIGINT ends any program."""
    with ScriptedServer((200, {}, LABELS), (200, {}, ANSWER)) as server:
        server.predict_gate.clear()
        with _interruptible(command, server.url, image_paths) as process:
            try:
                for _ in range(2):
                    assert server.came.acquire(timeout=60)
                for _ in range(600):  # two that come at once are one
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=0.1)
                        break
            finally:
                server.predict_gate.set()
                process.kill()
    assert process.returncode == -signal.SIGINT


def test_an_interrupt_while_a_lock_is_held_ends_it_too(command: Command, image_paths: list[Path]) -> None:
    """It comes where the main thread holds a lock that the pool's threads need to go on, and nothing hangs."""
    with (
        ScriptedServer((200, {}, LABELS), (200, {}, ANSWER)) as server,
        _interruptible(command, server.url, image_paths, start=_INTERRUPTED_WITH_A_LOCK) as process,
    ):
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, "")


def _interruptible(command: Command, url: str, paths: list[Path], start: str = _INTERRUPTIBLE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", start, "predict", "--json", "--url", url, *map(str, paths)],
        cwd=_ROOT,
        env=command.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
