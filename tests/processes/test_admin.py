"""The admin port: what it does, for whom, and that it is where nobody else reaches it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.support.patience import wait_until

_KEY = "only for admins"
_AS_ADMIN = {"Authorization": f"Bearer {_KEY}"}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number


@pytest.fixture
def file(checkpoint_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(checkpoint_path, tmp_path / "model.safetensors"))


def test_reload_and_rollback(file: Path, checkpoint: Checkpoint, port: int) -> None:
    """A new file is served after a reload, and the model before it after a rollback; each is answered with 202."""
    with (
        ServiceProcess(file, admin_listen=port, admin_key=_KEY) as service,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=_AS_ADMIN, timeout=60) as admin,
    ):
        metadata = checkpoint.metadata.model_copy(update={"code_revision": "another"})
        save_checkpoint(file, checkpoint.weights, metadata, canary=checkpoint.canary)
        new = load_checkpoint(file).version
        answer = admin.post("/reload")
        assert (answer.status_code, answer.json()["action"]) == (202, "reload")
        wait_until(lambda: httpx.get(service.url + "/health").json()["model"]["version"] == new)
        assert admin.post("/rollback").status_code == 202
        wait_until(lambda: httpx.get(service.url + "/health").json()["model"]["version"] == checkpoint.version)


def test_only_the_key_opens_it(checkpoint_path: Path, port: int) -> None:
    """Without it, or with a client's API key, nothing happens; other paths and methods are errors in words."""
    with ServiceProcess(checkpoint_path, admin_listen=port, admin_key=_KEY, api_keys="a client") as service:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as anyone:
            assert anyone.post("/reload").status_code == 401
            refused = anyone.post("/rollback", headers={"Authorization": "Bearer a client"})
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            assert anyone.post("/stop", headers=_AS_ADMIN).json()["code"] == "not_found"
            assert anyone.get("/reload", headers=_AS_ADMIN).status_code == 405
        assert httpx.get(service.url + "/reload", headers=_AS_ADMIN).status_code in (401, 404)
        assert "admin action" not in service.output
        with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine too: it listens on one address only
            socket.create_connection(("127.0.0.2", port), timeout=60)


def test_its_death_is_no_one_elses(checkpoint_path: Path, port: int, image_paths: list[Path]) -> None:
    """Killed, it is started again; predictions go on with the same engine and workers."""
    with ServiceProcess(checkpoint_path, admin_listen=port, admin_key=_KEY, log_format="text") as service:
        pid = int(re.findall(r"admin started pid=(\d+)", service.output)[0])
        os.kill(pid, signal.SIGKILL)
        service.wait_for_output("admin died")
        answer = httpx.post(service.url + "/predict", files={"file": image_paths[0].read_bytes()}, timeout=60)
        assert answer.status_code == 200
        service.wait_for_output("admin started pid", times=2)
        wait_until(lambda: httpx.post(f"http://127.0.0.1:{port}/reload", headers=_AS_ADMIN).status_code == 202)
        assert len(service.engine_pids) == 1


def test_without_a_key_or_a_free_port_the_service_does_not_start(checkpoint_path: Path, port: int) -> None:
    """Both end the start with what to do."""
    with ServiceProcess(checkpoint_path, until_ready=False, admin_listen=port) as service:
        assert service.wait() == 2
        assert "SERVICE_ADMIN_KEY" in service.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with ServiceProcess(checkpoint_path, until_ready=False, admin_listen=port, admin_key=_KEY) as service:
            assert service.wait() == 1
            assert f"cannot listen on 127.0.0.1:{port}" in service.output
