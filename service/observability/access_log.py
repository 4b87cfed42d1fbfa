"""One log line for each request: who asked what, how it went, where the time went."""

from __future__ import annotations

import logging

from service.observability.request_record import RequestRecord

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nginx's status for a client that did not wait; it is logged only, nobody ever receives it


class AccessLog:
    """Writes records as log lines whose ``fields`` the formatters of ``service.observability.logs`` show."""

    def write(self, record: RequestRecord) -> None:
        """Write one line; times in milliseconds, for several images the sum of decoding and the longest of the rest."""
        scope = record.scope
        fields: dict[str, object] = {
            "request_id": scope.request_id,
            "client": scope.client,
            "method": scope.method,
            "path": scope.path,
            "status": CLIENT_LEFT if record.status is None else record.status,
            "duration_ms": round(record.duration_s * 1e3, 3),
        }
        if record.answered:
            predictions = [answered.prediction for answered in record.answered]
            fields |= {
                "images": sum(len(prediction.probabilities) for prediction in predictions),
                "decode_ms": round(sum(answered.decode_s for answered in record.answered) * 1e3, 3),
                "queue_ms": round(max(prediction.queue_s for prediction in predictions) * 1e3, 3),
                "compute_ms": round(max(prediction.compute_s for prediction in predictions) * 1e3, 3),
                "batch_size": max(prediction.batch_size for prediction in predictions),
                "model": predictions[-1].model.version,
            }
        if record.refusals:
            fields["refused"] = ",".join(dict.fromkeys(record.refusals))
        if record.trace_id:
            fields["trace_id"] = record.trace_id
        logger.info("request", extra={"fields": fields})
