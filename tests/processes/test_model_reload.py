"""A new checkpoint without a pause: taken over under load, refused when it is not good, rolled back on request."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.servers.service_process import ServiceProcess
from service.engine.model_files import ModelFiles
from service.engine.model_store import ModelRefused, ModelStore
from service.model.checkpoint import Canary, Checkpoint, load_checkpoint, save_checkpoint
from service.settings import load_settings
from tests.support.load import Load
from tests.support.patience import wait_until
from tests.support.tiny_network import tiny_checkpoint


def vary(checkpoint: Checkpoint, path: Path, **changes: object) -> str:
    """Save ``checkpoint`` with other metadata, another version of the same model; give its version."""
    weights = {name: value.astype(np.float32) for name, value in checkpoint.weights.items()}
    metadata = checkpoint.metadata.model_copy(update=changes)
    return save_checkpoint(path, weights, metadata, canary=checkpoint.canary)


@pytest.fixture
def file(tmp_path: Path, checkpoint_path: Path) -> Path:
    """The checkpoint file that the service watches."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint_path.read_bytes())
    return path


def replace_file(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)


def test_a_new_checkpoint_takes_over_under_load_and_is_rolled_back(
    file: Path, checkpoint: Checkpoint, image_paths: list[Path]
) -> None:
    """No request fails, and every answer names the model that made it.

    A rollback outlives the engine's death: neither that nor a touched file brings the model back, and a later one can be rolled
    back to what was served before.
    """
    old = checkpoint.version
    with ServiceProcess(file, log_format="text") as service:
        with Load(service.url, image_paths[0].read_bytes()) as load:
            calibration = checkpoint.metadata.calibration
            warmer = calibration.model_copy(update={"temperature": calibration.temperature * 1.02})
            new = vary(checkpoint, file, calibration=warmer)
            service.wait_for_output("outcome=loaded")
            wait_until(lambda: load.versions[new] > 0)
            service.send_signal(signal.SIGUSR1)
            service.wait_for_output("outcome=rolled_back")
            answered = load.versions[old]
            wait_until(lambda: load.versions[old] > answered)
        assert set(load.statuses) == {200}
        assert load.lost == []
        assert set(load.versions) == {old, new}
        os.kill(service.engine_pids[-1], signal.SIGKILL)
        service.wait_until_ready(times=2)
        os.utime(file)
        service.send_signal(signal.SIGHUP)
        newest = vary(checkpoint, file, name="another-name-same-classes")
        service.wait_for_output("outcome=loaded", 2)
        service.send_signal(signal.SIGUSR1)
        service.wait_for_output("outcome=rolled_back", 2)
        wait_until(lambda: newest in httpx.get(service.url + "/health").json().get("detail", ""))
        health = httpx.get(service.url + "/health").json()
        assert health["model"]["version"] == old
        assert "rolled back" in health["detail"]
        assert service.output.count("outcome=") == 4


def _truncated(checkpoint: Checkpoint, path: Path) -> str:
    replace_file(path, path.read_bytes()[:-1000])
    return "damaged"


def _garbage(checkpoint: Checkpoint, path: Path) -> str:
    replace_file(path, b"no checkpoint" * 1000)
    return "damaged"


def _foreign(checkpoint: Checkpoint, path: Path) -> str:
    names = (*checkpoint.metadata.class_names[:-1], "submarine")
    vary(checkpoint, path, class_names=names)
    return "classes"


def _worse(checkpoint: Checkpoint, path: Path) -> str:
    """The same network with its classes in another order: sound by itself, and wrong about every known image."""
    weights = {name: value.astype(np.float32) for name, value in checkpoint.weights.items()}
    for name in ("head.weight", "head.bias"):
        weights[name] = np.roll(weights[name], 1, axis=0)
    assert checkpoint.canary is not None
    canary = Canary(checkpoint.canary.images, np.roll(checkpoint.canary.probabilities, 1, axis=1))
    save_checkpoint(path, weights, checkpoint.metadata, canary=canary)
    return "worse"


@pytest.mark.parametrize("spoil", [_truncated, _garbage, _foreign, _worse])
def test_a_bad_checkpoint_changes_nothing(
    file: Path,
    checkpoint: Checkpoint,
    checkpoint_path: Path,
    image_paths: list[Path],
    spoil: Callable[[Checkpoint, Path], str],
) -> None:
    """It is refused with its reason in log, health and metrics; the old model serves on, whatever happens to the engine."""
    with ServiceProcess(file) as service, httpx.Client(base_url=service.url, timeout=60) as client:
        reason = spoil(load_checkpoint(file), file)
        service.wait_for_output("model refused")
        wait_until(lambda: reason in client.get("/health").json().get("detail", ""))
        health = client.get("/health").json()
        assert health["status"] == "ready"
        assert str(file.parent) not in health["detail"]
        assert 'service_model_reloads_total{outcome="refused"} 1.0' in client.get("/metrics").text
        if spoil is _worse:
            os.kill(service.engine_pids[-1], signal.SIGKILL)
            service.wait_until_ready(times=2)
        answer = client.post("/predict", files={"file": image_paths[0].read_bytes()})
        assert answer.json()["model"]["version"] == checkpoint.version
        if spoil is _truncated:  # and the file becomes what is served again
            replace_file(file, checkpoint_path.read_bytes())
            wait_until(lambda: "detail" not in client.get("/health").json())


def test_sighup_looks_at_the_file_at_once_and_the_same_file_changes_nothing(file: Path, checkpoint: Checkpoint) -> None:
    """A hang-up signal over an unchanged file is harmless."""
    with ServiceProcess(file) as service:
        service.send_signal(signal.SIGHUP)
        os.utime(file)
        version = vary(checkpoint, file, code_revision="another")
        service.send_signal(signal.SIGHUP)
        service.wait_for_output("outcome.*loaded")
        wait_until(lambda: httpx.get(service.url + "/health").json()["model"]["version"] == version)
        assert len(service.engine_pids) == 1


def test_every_change_of_the_file_is_seen_once(tmp_path: Path) -> None:
    """Other content of the same size and time, other permissions, no file, and what is no file: each is refused once.

    What is served again clears the refusal, and takes no room.
    """
    files, file, tiny = ModelFiles(), tmp_path / "tiny.safetensors", tiny_checkpoint()
    save_checkpoint(file, tiny.weights, tiny.metadata)
    served = file.read_bytes()
    store = ModelStore(load_settings([f"--checkpoint={file}", "--max-batch-size=2"]), files)
    store.open()
    file.write_bytes(b"first")
    times = file.stat()

    def change_content() -> None:
        file.write_bytes(b"other")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    changes: dict[Callable[[], object], str] = {
        lambda: None: "damaged",
        change_content: "damaged",
        lambda: file.chmod(0o600): "",
        file.unlink: "no checkpoint",
        lambda: os.mkfifo(file): "not a file",
    }
    for change, why in changes.items():
        wait_until(lambda: time.time_ns() - max(store._tried or [0]) > 2e7)  # the system's clock for files has moved on
        change()
        assert store.has_new_file()
        if why:
            with pytest.raises(ModelRefused, match=why):
                store.check()
        else:  # it was refused before
            assert store.check() is None
        assert not store.has_new_file()
    size = files.slot(1).stat().st_size
    file.unlink()
    file.write_bytes(served)
    assert store.check() is None
    assert not store.refusal
    assert files.slot(1).stat().st_size == size
    for opened in files._slots:
        opened.close()


@pytest.mark.slow
def test_a_model_that_needs_another_number_of_streams_than_the_engine_has_is_refused(
    file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cores can change while a service runs; neither the file nor the model before is then taken over."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    files = ModelFiles()
    store = ModelStore(load_settings([f"--checkpoint={file}", "--runtime=openvino"]), files)
    old = store.open().info.version
    new = vary(checkpoint, file, name="another-name-same-classes")
    assert store.check() is not None
    with monkeypatch.context() as changed:
        changed.setattr(os, "sched_getaffinity", lambda process: {0})
        with pytest.raises(ModelRefused, match="cores at hand"):
            store.rollback()
        vary(checkpoint, file, name="yet-another-name")
        with pytest.raises(ModelRefused, match="cores at hand"):
            store.check()
    assert store._serving.info.version == new
    assert store.rollback().info.version == old
    for opened in files._slots:
        opened.close()
