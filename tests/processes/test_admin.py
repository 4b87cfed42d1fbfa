"""The admin routes: what they do, and for whom."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tests.support.patience import wait_until

_KEY = "only for admins"
_AS_ADMIN = {"Authorization": f"Bearer {_KEY}"}


@pytest.fixture
def file(checkpoint_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(checkpoint_path, tmp_path / "model.safetensors"))


def test_reload_and_rollback(file: Path, checkpoint: Checkpoint) -> None:
    """A new file is served after a reload, and the model before it after a rollback; each request is answered with 202.

    A reload is explicit: it serves a file again that was rolled back.
    """
    with (
        ServiceProcess(file, admin_key=_KEY, api_keys="a client") as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        metadata = checkpoint.metadata.model_copy(update={"code_revision": "another"})
        save_checkpoint(file, checkpoint.weights, metadata, canary=checkpoint.canary)
        new = load_checkpoint(file).version
        answer = client.post("/admin/reload", headers=_AS_ADMIN)
        assert (answer.status_code, answer.json()["action"]) == (202, "reload")
        wait_until(lambda: client.get("/health").json()["model"]["version"] == new)
        assert client.post("/admin/rollback", headers=_AS_ADMIN).status_code == 202
        wait_until(lambda: client.get("/health").json()["model"]["version"] == checkpoint.version)
        client.post("/admin/reload", headers=_AS_ADMIN)
        wait_until(lambda: client.get("/health").json()["model"]["version"] == new)


def test_only_the_admin_key_opens_them(checkpoint_path: Path) -> None:
    """Without it, or with a client's API key, nothing happens; the admin key is no API key."""
    with (
        ServiceProcess(checkpoint_path, admin_key=_KEY, api_keys="a client") as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert client.post("/admin/reload").status_code == 401
        refused = client.post("/admin/rollback", headers={"Authorization": "Bearer a client"})
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert client.post("/admin/stop", headers=_AS_ADMIN).status_code == 404
        assert client.get("/admin/reload", headers=_AS_ADMIN).status_code == 405
        assert client.get("/labels", headers=_AS_ADMIN).status_code == 401
        assert "admin action" not in service.output


def test_without_an_admin_key_there_are_no_such_routes(checkpoint_path: Path) -> None:
    """The routes are off by default."""
    with ServiceProcess(checkpoint_path) as service:
        assert httpx.post(f"{service.url}/admin/reload", headers=_AS_ADMIN).status_code == 404
