"""The images on a real engine: what is in them, least privilege, health, predictions, a graceful stop, compose."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from service.model.checkpoint import Checkpoint, save_checkpoint
from service.settings import DEFAULT_CHECKPOINT
from tests.support import docker_engine
from tests.support.docker_engine import ROOT, address, docker, inspect, running, wait_until_healthy
from tests.support.image_file import encoded
from tests.support.patience import wait_until

pytestmark = pytest.mark.slow

_RUN = uuid.uuid4().hex[:8]
_NAME = f"cifar10-prediction-service-test-{_RUN}"
_IMAGE = f"{_NAME}:cpu"
_MODEL = "/models/model.safetensors"
_MOST_IMAGE_BYTES = 1.2e9
_LIMIT_S = 120.0  # no expectation of speed: only the end of a test that would hang


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The CPU image, built from the working tree."""
    if reason := docker_engine.missing():
        pytest.skip(reason)
    docker_engine.build(_IMAGE, "cpu")
    yield _IMAGE
    docker("image", "rm", _IMAGE)


@pytest.fixture(scope="module")
def model_arguments(checkpoint_path: Path) -> list[str]:
    """None when the image has a checkpoint of its own, as it has when the repository has one."""
    if checkpoint_path == DEFAULT_CHECKPOINT:
        return []
    return [f"--volume={checkpoint_path}:/stand-in.safetensors:ro", "--env=SERVICE_CHECKPOINT=/stand-in.safetensors"]


@pytest.fixture(scope="module")
def container(image: str, model_arguments: list[str]) -> Iterator[str]:
    """A healthy service in a container, published on a free port of this machine."""
    with running(image, "--publish=127.0.0.1::8000", *model_arguments) as container:
        wait_until_healthy(container)
        yield container


def python(image: str, code: str) -> str:
    """What a line of Python prints inside the image."""
    return docker("run", "--rm", "--network=none", *docker_engine.HARDENED, "--entrypoint=python", image, "-c", code).strip()


def predicted_label(url: str, image_path: Path) -> str:
    """What the service says an image file is."""
    answer = httpx.post(f"{url}/predict", files={"file": image_path.read_bytes()}, timeout=60)
    assert answer.status_code == 200, answer.text
    label: str = answer.json()["label"]
    return label


def test_the_image_is_small(image: str) -> None:
    """At most 1.2 GB unpacked."""
    assert inspect(image)["Size"] <= _MOST_IMAGE_BYTES


def test_the_image_says_how_to_run_it(image: str) -> None:
    """Non-root by number, which orchestrators can check; SIGTERM; a health check without a shell; port 8000."""
    config = inspect(image)["Config"]
    assert config["User"] == "1000:1000"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    assert config["Entrypoint"] == ["python", "-m", "service"]


@pytest.mark.parametrize("module", ["torch", "torchvision", "training", "pytest", "pip"])
def test_the_image_has_nothing_that_serving_does_not_need(image: str, module: str) -> None:
    """No torch, no training code and none of its dependencies, no package manager for the packages."""
    assert python(image, f"import importlib.util; print(importlib.util.find_spec({module!r}))") == "None"


def test_every_file_of_the_service_is_compiled(image: str) -> None:
    """A read-only root cannot take bytecode later, and compiling at every start is slow."""
    code = (
        "import pathlib, importlib.util as u;"
        "print([str(p) for p in pathlib.Path('/app').rglob('*.py') if not pathlib.Path(u.cache_from_source(p)).exists()])"
    )
    assert python(image, code) == "[]"


def test_the_service_in_the_container_cannot_change_itself(container: str) -> None:
    """It runs as user 1000 and writes to /tmp alone."""
    code = "import os; print(os.getuid(), [p for p in ('/', '/app', '/models', '/opt/venv', '/tmp') if os.access(p, os.W_OK)])"
    assert docker("exec", container, "python", "-c", code).strip() == "1000 ['/tmp']"


def test_a_container_predicts(container: str, image_paths: list[Path]) -> None:
    """Most sample images get their own label, over HTTP from outside."""
    url = address(container, 8000)
    right = [predicted_label(url, path) == path.name.split("-")[0] for path in image_paths]
    assert sum(right) >= 0.7 * len(right)


def test_the_port_comes_from_the_environment(image: str, model_arguments: list[str]) -> None:
    """A platform that wants another port sets SERVICE_PORT, and the health check follows."""
    with running(image, "--env=SERVICE_PORT=7860", "--publish=127.0.0.1::7860", *model_arguments) as container:
        wait_until_healthy(container)
        assert httpx.get(f"{address(container, 7860)}/health", timeout=60).json()["status"] == "ready"


def test_a_service_that_is_not_ready_is_not_healthy(image: str) -> None:
    """The health check fails where nothing answers."""
    check = docker(
        "run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", "python /app/healthcheck.py || echo ' failed'"
    )
    assert check.startswith("no answer")
    assert check.endswith("failed\n")


def test_docker_stop_drains_and_exits_0(image: str, model_arguments: list[str], image_paths: list[Path]) -> None:
    """While it stops, health says draining and predictions are still answered; then it ends by itself."""
    with running(image, "--env=SERVICE_SHUTDOWN_GRACE_S=10", "--publish=127.0.0.1::8000", *model_arguments) as container:
        wait_until_healthy(container)
        url = address(container, 8000)
        stop = subprocess.Popen(["docker", "stop", "--time=120", container], stdout=subprocess.DEVNULL)
        wait_until(lambda: httpx.get(f"{url}/health", timeout=60).json()["status"] == "draining")
        assert predicted_label(url, image_paths[0])
        assert stop.wait(180) == 0
        state = inspect(container)["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)


def test_your_own_model_is_served_from_a_folder(image: str, own_model: tuple[Path, str]) -> None:
    """``docker run -v FOLDER:/models:ro`` serves the folder's model.safetensors."""
    folder, version = own_model
    with running(image, f"--volume={folder}:/models:ro", "--publish=127.0.0.1::8000") as container:
        wait_until_healthy(container)
        assert served_version(address(container, 8000)) == version


def test_flags_are_known_to_the_health_check(image: str, model_arguments: list[str]) -> None:
    """Address and port may be flags after the image's name."""
    with running(image, *model_arguments, command=("--host=::", "--port=9000")) as container:
        wait_until_healthy(container)


def test_a_pod_s_memory_suffices(image: str, model_arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With the CPUs and the memory of the manifest, many large photographs at once are answered or refused, and end nothing."""
    manifest = yaml.safe_load((ROOT / "docker" / "kubernetes" / "base" / "deployment.yaml").read_text())
    resources = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]
    limit, request = (int(resources[kind]["memory"].removesuffix("Mi")) for kind in ("limits", "requests"))
    options = [f"--memory={limit}m", f"--memory-swap={limit}m", f"--cpus={resources['limits']['cpu']}"]
    with running(image, *options, "--publish=127.0.0.1::8000", *model_arguments) as container:
        wait_until_healthy(container)
        idle = peak_mib(container)
        assert idle < request
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8))
        files = [
            encoded(noise.resize((4032, 3024)), "JPEG", quality=90),
            encoded(noise.resize((6000, 4000), Image.Resampling.NEAREST)),
        ]
        url = address(container, 8000)
        with ThreadPoolExecutor(32) as pool:
            answers = list(
                pool.map(lambda index: httpx.post(f"{url}/predict", content=files[index % 4 == 3], timeout=60), range(200))
            )
        with capsys.disabled():
            print(f"\nmemory of the container: {idle} MiB when idle, {peak_mib(container)} MiB at most, of {limit}")  # noqa: T201
        assert {answer.status_code for answer in answers} <= {200, 429, 503, 504}
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        scraped = httpx.get(f"{url}/metrics", timeout=60).text
        assert "service_engine_restarts_total 0.0" in scraped
        assert "service_worker_restarts_total 0.0" in scraped
        assert inspect(container)["State"]["OOMKilled"] is False


def peak_mib(container: str) -> int:
    """The most memory that a container has held, its page cache included, in MiB; by cgroup v2 or v1."""
    peaks = "cat /sys/fs/cgroup/memory.peak 2>/dev/null || cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"
    return int(docker("exec", container, "sh", "-c", peaks)) >> 20


@pytest.fixture
def own_model(checkpoint: Checkpoint, tmp_path: Path) -> tuple[Path, str]:
    """A folder with a model.safetensors that is not the image's, and its version."""
    folder = tmp_path / "run"
    folder.mkdir()
    metadata = checkpoint.metadata.model_copy(update={"code_revision": "own"})
    version = save_checkpoint(folder / "model.safetensors", checkpoint.weights, metadata, canary=checkpoint.canary)
    return folder, version


def test_compose_serves_a_folder_with_your_own_model(image: str, own_model: tuple[Path, str]) -> None:
    """``MODELS=FOLDER docker compose up`` serves the folder's model.safetensors, to this machine alone."""
    if docker_engine.compose_command() is None:
        pytest.skip("neither 'docker compose' nor 'docker-compose' is installed")
    folder, version = own_model
    try:
        compose("up", "--detach", "--no-build", MODELS=str(folder))
        container = compose("ps", "--quiet", "service").strip()
        wait_until_healthy(container)
        assert served_version(address(container, 8000)) == version
        (binding,) = inspect(container)["NetworkSettings"]["Ports"]["8000/tcp"]
        assert binding["HostIp"] == "127.0.0.1"
    finally:
        compose("down", "--volumes")


@pytest.fixture
def composed(image: str, checkpoint_path: Path) -> Iterator[str]:
    """The id of the service's container, healthy after ``compose up`` with ``checkpoint_path`` in the volume."""
    if docker_engine.compose_command() is None:
        pytest.skip("neither 'docker compose' nor 'docker-compose' is installed")
    try:
        compose("up", "--no-start", "--no-build")
        put_into_volume(image, checkpoint_path)
        compose("up", "--detach", "--no-build")
        container = compose("ps", "--quiet", "service").strip()
        wait_until_healthy(container)
        yield container
    finally:
        compose("down", "--volumes")


def compose(*arguments: str, **variables: str) -> str:
    """Run a compose command in a project of its own, with the image under test and a free port."""
    return docker_engine.compose(*arguments, project=_NAME, IMAGE=_NAME, PORT="0", **variables)


def put_into_volume(image: str, checkpoint: Path) -> None:
    """Replace the model in the volume atomically, as publishing a trained one does."""
    command = f"cp /new.safetensors /models/.new && mv /models/.new {_MODEL}"
    mounts = (f"--volume={_NAME}_models:/models", f"--volume={checkpoint}:/new.safetensors:ro")
    docker("run", "--rm", "--network=none", *mounts, "--entrypoint=sh", image, "-c", command)


def test_compose_serves_takes_over_new_models_and_stops(
    composed: str, image: str, checkpoint: Checkpoint, tmp_path: Path, image_paths: list[Path]
) -> None:
    """What is published into the volume is served soon after, twice, without a restart; then the stop is graceful."""
    url = address(composed, 8000)
    assert served_version(url) == checkpoint.version
    for revision in ("second", "third"):
        path = tmp_path / f"{revision}.safetensors"
        metadata = checkpoint.metadata.model_copy(update={"code_revision": revision})
        version = save_checkpoint(path, checkpoint.weights, metadata, canary=checkpoint.canary)
        put_into_volume(image, path)
        limit = time.monotonic() + _LIMIT_S
        while served_version(url) != version:
            assert time.monotonic() < limit, f"{revision} version was not taken over"
        assert predicted_label(url, image_paths[0])
    compose("stop")
    state = inspect(composed)["State"]
    assert (state["ExitCode"], inspect(composed)["RestartCount"]) == (0, 0)


def served_version(url: str) -> str:
    """The version of the model that would answer now."""
    version: str = httpx.get(f"{url}/health", timeout=60).json()["model"]["version"]
    return version
