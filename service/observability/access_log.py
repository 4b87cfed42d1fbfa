"""One log line for each request: client, request, status, and where the time went."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import re
import time
from json.encoder import encode_basestring_ascii as quoted

from service.observability.logs import PIPE_BYTES, utc_second, write_or_drop, writes_text
from service.observability.request_record import RequestRecord
from service.settings import Settings

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nginx's status for a client that did not wait; it is logged only, nobody ever receives it
_WRITE_AFTER_S = 0.05
_PLAIN = re.compile(r"[^\s\"'=]+")


class AccessLog:
    """Writes the same lines as a logger, several in one write, at most 50 ms later.

    A log record for each request, and JSON from that, took a quarter of a worker's time.
    """

    def __init__(self, settings: Settings) -> None:
        self._as_text = writes_text(settings)
        process = quoted(multiprocessing.current_process().name)
        self._constant = f'"level": "info", "process": {process}, "logger": "{__name__}", "message": "request"'
        self._lines: list[str] = []
        self._bytes = 0

    def write(self, record: RequestRecord) -> None:
        """Write one line; see ``_fields``."""
        fields = _fields(record)
        if self._as_text:
            pairs = (f"{name}={_plain(value)}" for name, value in json.loads(f"{{{fields}}}").items())
            logger.info("request %s", " ".join(pairs))
            return
        now = time.time()
        second = int(now)
        time_of = f"{utc_second(second)}.{int((now - second) * 1000):03d}Z"
        line = f'{{"time": "{time_of}", {self._constant}, {fields}}}\n'  # ASCII
        if self._bytes + len(line) > PIPE_BYTES:
            self.flush()
        if not self._lines:
            asyncio.get_running_loop().call_later(_WRITE_AFTER_S, self.flush)
        self._lines.append(line)
        self._bytes += len(line)

    def flush(self) -> None:
        """Write the buffered lines."""
        if self._lines:
            write_or_drop(2, "".join(self._lines))
            self._lines.clear()
            self._bytes = 0


def _plain(value: object) -> str:
    """Return a value as one word, quoted if a client's text could be read as more than one."""
    text = "-" if value is None else str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text)


def _fields(record: RequestRecord) -> str:
    """Return the members of a JSON object, times in ms; of several images the sum of decoding, the longest of the others."""
    scope = record.scope
    client = "null" if scope.client is None else quoted(scope.client)
    status = CLIENT_LEFT if record.status is None else record.status
    fields = (
        f'"request_id": {quoted(scope.request_id)}, "client": {client}, "method": {quoted(scope.method)}'
        f', "path": {quoted(scope.path)}, "status": {status}, "duration_ms": {record.duration_s * 1e3:.3f}'
    )
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
        fields += (
            f', "images": {images}, "decode_ms": {decode_s * 1e3:.3f}, "queue_ms": {queue_s * 1e3:.3f}'
            f', "compute_ms": {compute_s * 1e3:.3f}, "batch_size": {batch_size}, "model": {quoted(prediction.model.version)}'
        )
    if record.refusals:
        fields += f', "refused": "{",".join(dict.fromkeys(record.refusals))}"'
    if record.trace_id:
        fields += f', "trace_id": "{record.trace_id}"'
    return fields
