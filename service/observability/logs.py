"""Log lines on standard error, one per event: JSON, or text on a terminal. Control characters are escaped in both.

The fields of an event are those that its message names: ``"engine died status=%s", 9`` has the field ``status``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import socket
import stat
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from service.settings import Settings

_PLACEHOLDER = re.compile(r"%%|(?:(\w+)=)?%[-+ #0]*[\d.]*[diouxXeEfFgGcrsa]")
_PIPE_BYTES = 4096  # PIPE_BUF: a pipe that is ready has room for as many


def set_up_logs(settings: Settings) -> None:
    """Set up the root logger for this process and those forked from it."""
    handler = _StandardError()
    handler.setFormatter(TextFormatter() if writes_text(settings) else JsonFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def writes_text(settings: Settings) -> bool:
    """Return whether lines are text, not JSON."""
    return settings.log_format == "text" or (settings.log_format == "auto" and os.isatty(2))


def write_or_drop(descriptor: int, lines: bytes) -> None:
    """Write lines, or drop them when they cannot be written at once: a full or closed pipe neither blocks nor ends the service.

    A line of up to 4,096 bytes is written whole or not at all.
    """
    with contextlib.suppress(OSError):
        kind = os.fstat(descriptor)
        write = _writer(descriptor, kind.st_mode, kind.st_ino)
        while lines:
            end = lines.rfind(b"\n", 0, _PIPE_BYTES) + 1 or _PIPE_BYTES
            if not select.select([], [descriptor], [], 0)[1]:
                return
            write(lines[:end])
            lines = lines[end:]


@lru_cache(8)
def _writer(descriptor: int, mode: int, _inode: int) -> Callable[[bytes], int]:
    """Return what writes to a pipe, terminal or socket without waiting, although others fill it at the same moment.

    A descriptor that is set not to block would not block for anybody who has it, so a pipe or terminal is opened again.
    """
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            return partial(os.write, again)
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(descriptor))
        return lambda data: connection.send(data, socket.MSG_DONTWAIT)
    return partial(os.write, descriptor)


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_or_drop(2, f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:  # the message does not fit its arguments
            self.handleError(record)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of an event: each ``name=%s`` of the message with its value."""
    if not isinstance(record.args, tuple):
        return {}
    placeholders = [match for match in _PLACEHOLDER.finditer(str(record.msg)) if match[0] != "%%"]
    return {match[1]: value for match, value in zip(placeholders, record.args, strict=False) if match[1]}


@lru_cache(maxsize=2)
def utc_second(seconds: int) -> str:
    """Return a time in seconds since the epoch as RFC 3339 writes it, without fraction and zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, process, logger, message, the fields, and any exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": f"{utc_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": record.processName,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in fields_of(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time of day, level, process, logger and message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(processName)s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without any exception."""
        return _escaped(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:
        """Return the traceback, escaped except for its line breaks."""
        return "\n".join(map(_escaped, super().formatException(exc_info).splitlines()))


def _escaped(text: str) -> str:
    """Return the text with everything escaped that could move a terminal's cursor or start a new line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
