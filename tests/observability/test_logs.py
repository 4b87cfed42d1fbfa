"""Log lines: JSON for machines, text for people, one line an event, and one for each request where that is asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.servers.certificate import self_signed
from benchmarks.servers.service_process import ServiceProcess
from service.observability.access_log import AccessLog
from service.observability.logs import JsonFormatter, TextFormatter, write_or_drop
from service.observability.request_record import RequestRecord, Scope
from service.settings import load_settings

LOG_ONE_LINE = """
import logging
from service.observability.logs import set_up_logs
from service.settings import load_settings
set_up_logs(load_settings({arguments!r}))
logging.getLogger("service.test").warning("engine died status=%s", 9)
"""


def record(message: str, *arguments: object) -> logging.LogRecord:
    """A record as a module's logger makes it."""
    return logging.LogRecord("service.test", logging.INFO, __file__, 1, message, arguments, None)


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(made)
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    return fields


def test_json_lines_have_the_message_and_its_named_values_as_fields() -> None:
    """``name=%s`` in a message is a field with the value's own type; what has no name is in the message only."""
    fields = as_json(record("%d of %s died index=%d status=%s after_s=%.1f 100%%", 1, "two", 3, None, 2.25))
    assert fields["message"] == "1 of two died index=3 status=None after_s=2.2 100%"
    assert (fields["index"], fields["status"], fields["after_s"]) == (3, None, 2.25)
    assert (fields["level"], fields["logger"]) == ("info", "service.test")
    assert fields.keys() == {"time", "level", "process", "logger", "message", "index", "status", "after_s"}


def test_json_lines_tell_the_time_in_utc_with_milliseconds() -> None:
    """The time is RFC 3339, whatever the machine's time zone."""
    made = record("now")
    made.created, made.msecs = 1_700_000_000.25, 250.0
    assert as_json(made)["time"] == "2023-11-14T22:13:20.250Z"


def test_fields_cannot_replace_what_every_line_has() -> None:
    """An event's own ``level`` or ``message`` does not hide the line's."""
    fields = as_json(record("level=%s message=%s path=%s", "up", "made", "/predict"))
    assert (fields["level"], fields["message"], fields["path"]) == ("info", "level=up message=made path=/predict", "/predict")


def test_an_exception_is_a_field_of_the_same_line() -> None:
    """A traceback does not spill over several lines."""
    try:
        raise ValueError("no\nluck")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    assert "ValueError: no\nluck" in as_json(made)["exception"]


def test_a_request_in_text_stays_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """What a client sent cannot begin a new line or pass for another field."""
    sent = Scope("GET", "/a b\nERROR forged status=500", headers=[(b"x-request-id", b"one")])
    with caplog.at_level(logging.INFO):
        AccessLog(load_settings(["--log_format=text"])).write(RequestRecord(sent))
    line = TextFormatter().format(caplog.records[-1])
    assert 'request request_id=one client=- method=GET path="/a b\\nERROR forged status=500" status=499 ' in line
    assert "\n" not in line


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_control_characters_are_escaped(formatter: logging.Formatter) -> None:
    """Neither a message nor a field nor an exception can move a terminal's cursor or write right to left."""
    hostile = "\x1b[2J\r\x7f\x9b\u202e"
    made = record("cannot read %s path=%s", hostile, hostile)
    try:
        raise ValueError(hostile)
    except ValueError:
        made.exc_info = sys.exc_info()
    assert formatter.format(made).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("arguments", "terminal", "is_json"),
    [([], False, True), ([], True, False), (["--log_format=json"], True, True), (["--log_format=text"], False, False)],
)
def test_a_terminal_gets_text_and_everything_else_json(arguments: list[str], terminal: bool, is_json: bool) -> None:
    """Standard error decides, unless the setting does."""
    command = [sys.executable, "-c", LOG_ONE_LINE.format(arguments=arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("SERVICE_")}
    if terminal:
        reader, writer = pty.openpty()
        subprocess.run(command, stderr=writer, check=True, env=environment)
        line = os.read(reader, 4096).decode()
        os.close(reader)
        os.close(writer)
    else:
        line = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stderr
    assert "engine died status=9" in line
    assert line.startswith("{") == is_json


def test_every_request_has_a_line_with_its_id_outcome_and_times(checkpoint_path: Path, image_paths: list[Path]) -> None:
    """Access lines carry what is needed to find a slow or refused request; scrapes are left out."""
    image = image_paths[0].read_bytes()
    with ServiceProcess(checkpoint_path, workers=1, access_log=True) as service:
        answered = httpx.post(
            f"{service.url}/predict", content=image, headers={"X-Request-ID": "one", "Content-Type": "image/png"}
        )
        httpx.post(f"{service.url}/predict", content=image[:100], headers={"X-Request-ID": "two", "Content-Type": "image/png"})
        files = [("file", image), ("file", image), ("file", b"no image")]
        httpx.post(f"{service.url}/predict/batch", files=files, headers={"X-Request-ID": "three"})
        httpx.get(f"{service.url}/metrics", headers={"X-Request-ID": "scrape"})
        httpx.get(f"{service.url}/nowhere%0A?secret=1", headers={"X-Request-ID": "four"})
        service.wait_for_output('"request_id": "four"')
        output = service.output
    lines = [json.loads(line) for line in output.splitlines() if '"message": "request"' in line]
    assert [line["request_id"] for line in lines] == ["one", "two", "three", "four"]
    one, two, three, four = lines
    assert (one["method"], one["path"], one["status"], one["client"]) == ("POST", "/predict", 200, "127.0.0.1")
    assert (one["images"], one["batch_size"], one["model"]) == (1, 1, answered.json()["model"]["version"])
    timing = f"decode;dur={one['decode_ms']:.3f}, queue;dur={one['queue_ms']:.3f}, compute;dur={one['compute_ms']:.3f}"
    assert answered.headers["Server-Timing"] == timing
    assert one["duration_ms"] >= one["decode_ms"] + one["queue_ms"] + one["compute_ms"]
    assert (two["status"], two["refused"]) == (422, "invalid_image")
    assert "batch_size" not in two
    assert (three["status"], three["images"], three["refused"]) == (200, 2, "invalid_image")
    assert (four["status"], four["path"]) == (404, "/nowhere\n")  # without the query, which may hold what is private


def test_a_pipe_that_nobody_reads_has_whole_lines() -> None:
    """Lines of several writes at once are dropped where the pipe is full, and none is cut."""
    reader, writer = os.pipe()
    lines = b"".join(b"%05d %s\n" % (number, b"x" * (number % 700)) for number in range(400))
    write_or_drop(writer, lines)
    written = os.read(reader, len(lines))
    os.close(reader)
    os.close(writer)
    assert len(written) > 32_768
    assert written.endswith(b"\n")
    assert lines.startswith(written)


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_no_client_causes_a_traceback(checkpoint_path: Path, image_paths: list[Path], tmp_path: Path, tls: bool) -> None:
    """Whatever clients send, and whenever they leave, each line of the log is one event, and none has a traceback."""
    image = image_paths[0].read_bytes()
    options: dict[str, Any] = {"workers": 1, "log_format": "text", "access_log": True, "rate_limit": "40/minute"}
    if tls:
        options |= self_signed(tmp_path)
    with ServiceProcess(checkpoint_path, **options) as service, httpx.Client(base_url=service.url, verify=False) as client:
        address = httpx.URL(service.url)
        for data in (
            b"",
            b"\x16\x03\x01",
            b"GET / HTTP/1.1\r\nHost: a\x1b[2J\r\n\r\n",
            b"\x80" * 100,
            b"POST /predict HTTP/1.1\r\n",
        ):
            with socket.create_connection((address.host, address.port)) as leaving:
                leaving.sendall(data)
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        for body in (b"", image[:100], b"{", b"[" * 100_000, b"--a\r\n\r\n--a--"):
            for kind in ("image/png", "application/json", "multipart/form-data; boundary=a", "text/plain"):
                for path in ("/predict", "/predict/batch", "/hf%1B%5B2J%0A"):
                    client.post(path, content=body, headers={"Content-Type": kind})
        with contextlib.suppress(httpx.TimeoutException):
            client.post("/predict", content=image, headers={"Content-Type": "image/png"}, timeout=1e-4)
        client.get("/nowhere", headers={"X-Request-ID": "last"})
        service.wait_for_output("last")
        output = service.output
    lines = output.splitlines()
    assert not [line for line in lines if not re.match(r"\d\d:\d\d:\d\d\.\d{3} (INFO|WARNING) |engine started|ready on", line)]
    assert "rate_limited" in output
    assert output.replace("\n", "").isprintable()


def test_no_request_has_a_line_by_default(service: ServiceProcess, image_paths: list[Path]) -> None:
    """The access log is off unless it is asked for."""
    httpx.post(f"{service.url}/predict", content=image_paths[0].read_bytes(), headers={"X-Request-ID": "silent-please"})
    assert "silent-please" not in service.output
