"""Where log lines go and what they look like: one line an event on standard error, JSON unless a person reads along.

Owns: the two formats. Does not know: who logs what.

The fields of an event are what its message names (``"engine died status=%s", 9`` has the field ``status``), and, where a
message has no room for them, ``extra={"fields": {...}}``.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from service.settings import Settings

_PLACEHOLDER = re.compile(r"%%|(?:(\w+)=)?%[-+ #0]*[\d.]*[diouxXeEfFgGcrsa]")
_PLAIN = re.compile(r"[^\s\"'=\x00-\x1f\x7f-\x9f]+")


def set_up_logs(settings: Settings) -> None:
    """Set up the root logger for this process and those forked from it."""
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel("WARNING")


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Give what the event names: ``name=%s`` in the message with the value as it was logged, then ``fields``."""
    named: dict[str, Any] = {}
    if isinstance(record.args, tuple):
        placeholders = [match for match in _PLACEHOLDER.finditer(str(record.msg)) if match[0] != "%%"]
        named = {match[1]: value for match, value in zip(placeholders, record.args, strict=False) if match[1]}
    given = getattr(record, "fields", None)
    return named | dict(given) if isinstance(given, Mapping) else named


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, process, logger, message, the fields, and any exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
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
    """Time of day, level, process, logger, message, then ``fields`` as ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(processName)s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Give the line without any exception."""
        fields = getattr(record, "fields", None)
        line = super().formatMessage(record)
        return line if not fields else " ".join([line, *(f"{name}={_plain(value)}" for name, value in fields.items())])


def _plain(value: object) -> str:
    """Write a value so that it stays one word in one line, whatever a client has put into it."""
    text = "-" if value is None else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
