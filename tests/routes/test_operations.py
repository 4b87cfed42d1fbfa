"""What those who run the service ask, over real sockets."""

from __future__ import annotations

import httpx

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint


def test_health_and_labels_tell_the_model(service: ServiceProcess, checkpoint: Checkpoint) -> None:
    """Ready, with the model's version, the device and the runtime; the labels are the checkpoint's, in order."""
    for path in ("/health", "/health/ready", "/health/live"):
        response = httpx.get(f"{service.url}{path}", timeout=60)
        assert response.status_code == 200
        body = response.json()
        assert body["status"] == "ready"
        assert body["model"]["version"] == checkpoint.version
        assert set(body) == {"status", "version", "model", "device", "runtime", "queue_depth", "uptime_s"}
    assert httpx.get(f"{service.url}/labels", timeout=60).json()["labels"] == list(checkpoint.metadata.class_names)
