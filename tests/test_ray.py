"""The application on Ray Serve: what Ray is told, health as the engine has it, and a cluster that loses what it runs on."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from service.model.checkpoint import Checkpoint
from service.settings import SettingsError, load_settings
from tests.processes.test_model_reload import vary
from tests.support.fake_runner import predict
from tests.support.load import Load
from tests.support.patience import until, wait_until
from tests.support.ray_cluster import RayCluster, send_signal, session_pids

pytestmark = pytest.mark.slow

_CLIENTS = 16


@pytest.fixture(scope="module")
def ray_app() -> ModuleType:
    """The module under test, where Ray is installed; its import takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own code
        pytest.importorskip("ray.serve", reason="needs the extra 'ray'")
        import service.ray_app

        return service.ray_app


@pytest.fixture(scope="module")
def cluster(ray_app: ModuleType) -> Iterator[RayCluster]:
    """One node with room for two replicas and, while they are replaced, for a third."""
    with RayCluster(cpus=3) as running:
        yield running


@pytest.fixture
def image(image_paths: list[Path]) -> bytes:
    """A cat."""
    return next(path for path in image_paths if path.name.startswith("cat")).read_bytes()


def options_of(application: Any) -> Any:
    """The one deployment of a Serve application."""
    return application._bound_deployment


# What Ray is told


def test_arguments_cut_the_replicas(ray_app: ModuleType) -> None:
    """CPUs and parts of a GPU are what Ray reserves and what the runtime uses; the counts bound the autoscaling."""
    deployment = options_of(ray_app.app({"gpus": "0.25", "cpus": "2", "min_replicas": "2", "max_replicas": "8"}))
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.25}
    autoscaling = deployment._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (2, 8)
    (settings,) = deployment.init_args
    assert (settings.device, settings.cpu_threads) == ("cuda", 2)


def test_settings_come_from_the_environment_of_whoever_deploys(ray_app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replica gets the same ones; without a GPU reserved, none is used."""
    monkeypatch.setenv("SERVICE_MAX_QUEUE_IMAGES", "100")
    monkeypatch.setenv("SERVICE_MAX_IMAGES_PER_REQUEST", "10")
    monkeypatch.setenv("SERVICE_MAX_BATCH_SIZE", "10")
    monkeypatch.setenv("SERVICE_DRAIN_TIMEOUT_S", "7")
    deployment = options_of(ray_app.app({}))
    (settings,) = deployment.init_args
    assert (settings.max_queue_images, settings.max_batch_size, settings.device) == (100, 10, "cpu")
    assert deployment.max_ongoing_requests == 140  # the engine refuses before Ray holds anything back
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7


def test_what_would_have_no_effect_is_refused(ray_app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt argument, and a certificate that nobody would use."""
    with pytest.raises(ValueError, match=r"replicas\n.*Extra inputs are not permitted"):
        ray_app.app({"replicas": 2})
    monkeypatch.setenv("SERVICE_TLS_CERTIFICATE", "certificate.pem")
    with pytest.raises(SettingsError, match="ssl_certfile"):
        ray_app.app({})


# Health


def test_health_is_the_engine_s(ray_app: ModuleType, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's check passes on a sound engine, and fails on a batch that takes too long and on an engine that has ended."""
    replica_class = ray_app.Replica.__bases__[0]  # without what Ray adds
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    async def check() -> None:
        replica = replica_class(
            load_settings([f"--checkpoint={checkpoint_path}", "--cpu_threads=1"]).model_copy(update={"device_timeout_s": 1e-9})
        )
        await replica.check_health()
        images = np.zeros((64, 3, 32, 32), np.uint8)
        prediction = asyncio.ensure_future(predict(replica._engine, images, time.monotonic() + 60))
        await until(lambda: replica._engine.longest_running_s > 0)
        with pytest.raises(RuntimeError, match="the device hangs"):
            await replica.check_health()
        assert (await prediction).probabilities.shape == (64, 10)
        await replica.check_health()
        replica._engine.close()
        with pytest.raises(RuntimeError, match="the engine is failed"):
            await replica.check_health()

    asyncio.run(check())


# A cluster


def test_the_same_application_answers(cluster: RayCluster, image: bytes, checkpoint: Checkpoint) -> None:
    """Predictions, health and problems are those of ``python -m service``."""
    cluster.deploy(replicas=1)
    answer = httpx.post(f"{cluster.url}/predict", content=image, headers={"content-type": "image/png"}).raise_for_status()
    assert answer.json()["label"] == "cat"
    assert answer.json()["model"]["version"] == checkpoint.version
    health = httpx.get(f"{cluster.url}/health")
    assert (health.status_code, health.json()["status"]) == (200, "ready")
    refused = httpx.post(f"{cluster.url}/predict", content=b"no image", headers={"content-type": "image/png"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_image")


def test_an_update_fails_no_request(cluster: RayCluster, image: bytes, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The replica that is replaced answers until the one with the new model does."""
    path = tmp_path / "model.safetensors"
    new = vary(checkpoint, path, metrics={"note": "the same network in another file"})
    cluster.deploy(replicas=1)
    with Load(cluster.url, image) as load:
        load.wait_for_more(200, 50)
        assert set(load.versions) == {checkpoint.version}
        cluster.deploy(replicas=1, checkpoint=path)
        wait_until(lambda: load.versions[new] > 50)
    assert set(load.statuses) == {200}
    assert load.lost == []


def test_a_replica_that_is_killed_fails_what_it_worked_on_and_no_more(cluster: RayCluster, image: bytes) -> None:
    """The other one goes on answering, and Ray starts it again."""
    cluster.deploy(replicas=2)
    victim, survivor = cluster.replica_pids()
    with Load(cluster.url, image, clients=_CLIENTS) as load:
        kill_under(load, [victim])
        wait_until(lambda: len(cluster.replica_pids()) == 2 and victim not in cluster.replica_pids())
        load.wait_for_more(200, 100)
    assert survivor in cluster.replica_pids()
    assert_only_work_in_flight_failed(load)


def test_a_node_that_is_killed_fails_what_it_worked_on_and_no_more(ray_app: ModuleType, image: bytes) -> None:
    """The replica of the node that is left goes on answering."""
    with RayCluster(cpus=1) as cluster, cluster.add_node() as node:
        cluster.deploy(replicas=2)
        assert len(set(cluster.replica_pids()) & set(session_pids(node))) == 1
        with Load(cluster.url, image, clients=_CLIENTS) as load:
            kill_under(load, session_pids(node))
            wait_until(lambda: len(cluster.replica_pids()) == 1)
            load.wait_for_more(200, 100)
    assert_only_work_in_flight_failed(load)


def kill_under(load: Load, pids: list[int]) -> None:
    """Kill processes while requests wait for them: they are stopped first, until the others have answered a while."""
    load.wait_for_more(200, 100)
    send_signal(pids, signal.SIGSTOP)
    load.wait_for_more(200, 100)
    send_signal(pids, signal.SIGKILL)
    load.wait_for_more(200, 100)


def assert_only_work_in_flight_failed(load: Load) -> None:
    """Ray's proxy answers 500 for what a replica had begun when it died, at most one request of each client; the rest 200.

    What the replica had not begun goes to another one. No connection is lost.
    """
    assert set(load.statuses) <= {200, 500}
    assert load.statuses[500] <= _CLIENTS
    assert load.lost == []
