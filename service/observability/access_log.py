"""One log line for each request: client, request, status, and where the time went."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import re
import time
from json.encoder import encode_basestring_ascii

from service.observability.logs import utc_second, write_or_drop, writes_text
from service.observability.request_record import RequestRecord
from service.settings import Settings

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nginx's status for a client that did not wait; it is logged only, nobody ever receives it
_WRITE_AFTER_S = 0.05
_PLAIN = re.compile(r"[^\s\"'=]+")
_WRITE_BYTES = 16_384  # a quarter of what a pipe holds; each write wakes who reads it, which takes as long as five lines

_REQUEST = b'"request_id": "%b", "client": %b, "method": %b, "path": %b, "status": %d, "duration_ms": %.3f'
_ANSWERED = b', "images": %d, "decode_ms": %.3f, "queue_ms": %.3f, "compute_ms": %.3f, "batch_size": %d, "model": "%b"'


class AccessLog:
    """Writes the same lines as a logger, several in one write, at most 50 ms later.

    A log record for each request, and JSON from that, took a quarter of a worker's time.
    """

    _timer: asyncio.TimerHandle  # while there are lines

    def __init__(self, settings: Settings) -> None:
        self._as_text = writes_text(settings)
        process = _quoted(multiprocessing.current_process().name).replace(b"%", b"%%")
        self._line = b'{"time": "%b.%03dZ", "level": "info", "process": ' + process
        self._line += f', "logger": "{__name__}", "message": "request", %b}}\n'.encode()
        self._lines = bytearray()

    def write(self, record: RequestRecord) -> None:
        """Write one line; see ``_fields``."""
        fields = _fields(record)
        if self._as_text:
            pairs = (f"{name}={_plain(value)}" for name, value in json.loads(b"{%b}" % fields).items())
            logger.info("request %s", " ".join(pairs))
            return
        now = time.time()
        second = int(now)
        line = self._line % (utc_second(second).encode(), (now - second) * 1000, fields)
        if not self._lines:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_AFTER_S, self.flush)
        self._lines += line
        if len(self._lines) > _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        if self._lines:
            self._timer.cancel()
            write_or_drop(2, bytes(self._lines))
            self._lines.clear()


def _plain(value: object) -> str:
    """Return a value as one word, quoted if a client's text could be read as more than one."""
    text = "-" if value is None else str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text)


def _quoted(text: str) -> bytes:
    return encode_basestring_ascii(text).encode()


def _fields(record: RequestRecord) -> bytes:
    """Return the members of a JSON object, times in ms; of several images the sum of decoding, the longest of the others."""
    scope = record.scope
    client = b"null" if scope.client is None else _quoted(scope.client)
    status = CLIENT_LEFT if record.status is None else record.status
    method, path, duration_ms = _quoted(scope.method), _quoted(scope.path), record.duration_s * 1e3
    fields = _REQUEST % (scope.request_id.encode(), client, method, path, status, duration_ms)
    if record.answered:
        first, *others = record.answered
        prediction, images, decode_s = first.prediction, len(first.prediction.probabilities), first.decode_s
        queue_s, compute_s, batch_size = prediction.queue_s, prediction.compute_s, prediction.batch_size
        for answered in others:
            prediction = answered.prediction
            images += len(prediction.probabilities)
            decode_s += answered.decode_s
            queue_s = max(queue_s, prediction.queue_s)
            compute_s = max(compute_s, prediction.compute_s)
            batch_size = max(batch_size, prediction.batch_size)
        version = prediction.model.version.encode()
        fields += _ANSWERED % (images, decode_s * 1e3, queue_s * 1e3, compute_s * 1e3, batch_size, version)
    if record.refusals:
        fields += b', "refused": "%b"' % ",".join(dict.fromkeys(record.refusals)).encode()
    if record.trace_id:
        fields += b', "trace_id": "%b"' % record.trace_id.encode()
    return fields
