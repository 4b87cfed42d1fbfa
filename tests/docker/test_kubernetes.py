"""The Kubernetes manifests as ``kubectl kustomize`` renders them: valid by the official schemas, and true to the service."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from benchmarks.servers.service_process import ServiceProcess
from service.settings import Settings

_FOLDER = Path(__file__).parents[2] / "docker" / "kubernetes"
_OVERLAYS = sorted(path.parent.name for path in _FOLDER.glob("*/kustomization.yaml") if path.parent.name != "base")
_OLDEST_VERSION = "1.30"  # the first that has the preStop action sleep without a feature gate
_TAGS = ("cpu", "cuda")  # of the Dockerfile's targets

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which renders without a cluster")


@cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    """Everything that ``kubectl apply -k`` would apply."""
    text = subprocess.run(
        ["kubectl", "kustomize", str(_FOLDER / overlay)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return tuple(yaml.safe_load_all(text))


def the(kind: str, overlay: str = "cpu") -> dict[str, Any]:
    """The only manifest of a kind."""
    (manifest,) = [manifest for manifest in rendered(overlay) if manifest["kind"] == kind]
    return manifest


def pod_of(overlay: str) -> dict[str, Any]:
    """The pod template of the Deployment: its metadata and spec."""
    template: dict[str, Any] = the("Deployment", overlay)["spec"]["template"]
    return template


def container_of(overlay: str) -> dict[str, Any]:
    """The container of the service."""
    (container,) = pod_of(overlay)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("version", [_OLDEST_VERSION, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("overlay", _OVERLAYS)
def test_what_is_rendered_is_valid_by_the_official_schema(overlay: str, version: str) -> None:
    """Strict: a field that Kubernetes does not know is an error, since it would silently have no effect."""
    for manifest in rendered(overlay):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_manifest_is_part_of_an_overlay() -> None:
    """No file lies there that nothing applies."""
    for folder in _FOLDER.iterdir():
        files = {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
        assert files <= set(yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"])


@pytest.mark.parametrize("overlay", _OVERLAYS)
def test_every_container_is_an_image_of_the_dockerfile_with_least_privilege(overlay: str) -> None:
    """Image and tag are what ``docker build`` is told to make, init containers included, and none may change itself."""
    spec = pod_of(overlay)["spec"]
    for container in spec.get("initContainers", []) + spec["containers"]:
        name, tag = container["image"].split(":")
        assert name == "cifar10-prediction-service"
        assert tag in _TAGS
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
    assert spec["securityContext"]["runAsNonRoot"] is True


def test_selectors_choose_the_pods_of_the_deployment() -> None:
    """A selector that matches nothing is valid and does nothing."""
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment"):
        spec = the(kind)["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        labels = selector.get("matchLabels", selector)
        assert labels.items() <= pod_of("cpu")["metadata"]["labels"].items(), kind
        assert labels, kind


def test_the_autoscaler_scales_the_deployment() -> None:
    """It names the Deployment by kind and name."""
    deployment, target = the("Deployment"), the("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


def test_every_port_is_the_one_the_container_listens_on() -> None:
    """Service, probes, network policy and scraping name the same port, and the setting that chooses it agrees."""
    container = container_of("cpu")
    (port,) = container["ports"]
    probes = [container[kind]["httpGet"]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    targets = [entry["targetPort"] for entry in the("Service")["spec"]["ports"]]
    allowed = [entry["port"] for rule in the("NetworkPolicy")["spec"]["ingress"] for entry in rule["ports"]]
    assert {*probes, *targets, *allowed} == {port["name"]}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    scraped = pod_of("cpu")["metadata"]["annotations"]["prometheus.io/port"]
    assert environment["SERVICE_PORT"] == scraped == str(port["containerPort"])


@pytest.mark.parametrize("overlay", _OVERLAYS)
def test_variables_of_the_container_are_settings(overlay: str) -> None:
    """A misspelt variable would end the start of every pod."""
    names = [entry["name"] for entry in container_of(overlay)["env"]]
    assert {name.removeprefix("SERVICE_").lower() for name in names} <= Settings.model_fields.keys()


def test_a_pod_has_time_to_answer_what_it_accepted() -> None:
    """The grace period holds preStop, the grace and the drain of the settings' defaults, and ten seconds to end."""
    pause_s = container_of("cpu")["lifecycle"]["preStop"]["sleep"]["seconds"]
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    needed_s = pause_s + defaults["shutdown_grace_s"] + defaults["drain_timeout_s"] + 10
    assert pod_of("cpu")["spec"]["terminationGracePeriodSeconds"] >= needed_s


def test_the_gpu_overlay_asks_for_a_gpu() -> None:
    """The CUDA image on a node with a GPU, which is not shared with other pods."""
    container = container_of("gpu")
    assert container["image"].endswith(":cuda")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_ingress_serves_its_host_with_tls() -> None:
    """The host of the rule has a certificate, the backend is the Service's port, and bodies may be as large as it takes."""
    ingress, service = the("Ingress", "ingress"), the("Service", "ingress")
    (rule,), (tls,) = ingress["spec"]["rules"], ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert (backend["name"], backend["port"]["name"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["name"])
    size = ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert size == f"{Settings.model_fields['max_body_bytes'].default // 2**20}m"


@pytest.mark.parametrize("overlay", ["model-download", "model-volume"])
def test_an_own_model_comes_from_the_init_container(overlay: str) -> None:
    """What it prepares is mounted where the image serves from, and the service cannot change it."""
    (init,), container = pod_of(overlay)["spec"]["initContainers"], container_of(overlay)
    (prepared,) = init["volumeMounts"]
    (served,) = [mount for mount in container["volumeMounts"] if mount["name"] == prepared["name"]]
    assert prepared["mountPath"] == served["mountPath"] == "/models"
    assert served["readOnly"] is True
    assert prepared["name"] in {volume["name"] for volume in pod_of(overlay)["spec"]["volumes"]}
    dockerfile = (_FOLDER.parents[1] / "Dockerfile").read_text()
    assert "SERVICE_CHECKPOINT=/models/model.safetensors" in dockerfile


@pytest.mark.parametrize("damage", ["", "0"], ids=["sound", "damaged"])
def test_a_downloaded_model_is_the_one_that_was_meant(tmp_path: Path, damage: str) -> None:
    """The init container's program keeps a file of the right SHA-256 and refuses any other."""
    (init,) = pod_of("model-download")["spec"]["initContainers"]
    *_, program = init["command"]
    source, target = tmp_path / "source", tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    variables = {"MODEL_URL": source.as_uri(), "MODEL_SHA256": hashlib.sha256(b"weights" + damage.encode()).hexdigest()}
    assert {entry["name"] for entry in init["env"]} == variables.keys()
    program = program.replace("/models/model.safetensors", str(target))
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, target.exists()) == ((1, False) if damage else (0, True)), done.stderr
    assert ("SHA-256" in done.stderr) == bool(damage)


def test_probes_and_scraping_ask_paths_that_answer(service: ServiceProcess) -> None:
    """Each path of the manifests answers 200 on a service that is ready."""
    container = container_of("cpu")
    paths = {container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    paths.add(pod_of("cpu")["metadata"]["annotations"]["prometheus.io/path"])
    assert {path: httpx.get(service.url + path).status_code for path in paths} == dict.fromkeys(paths, 200)


def test_the_autoscaler_reads_a_metric_that_exists(service: ServiceProcess) -> None:
    """The pods' metric that the autoscaler scales on is a gauge among the service's own."""
    (metric,) = the("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in httpx.get(service.url + "/metrics").text.splitlines()
