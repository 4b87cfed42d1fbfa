"""The Kubernetes manifests: valid by the official schemas, and true to the service's routes, settings and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from benchmarks.servers.service_process import ServiceProcess
from service.settings import Settings

_FOLDER = Path(__file__).parents[2] / "docker" / "kubernetes"
_KUSTOMIZATION = "kustomization.yaml"
_MANIFESTS = sorted(path.name for path in _FOLDER.glob("*.yaml") if path.name != _KUSTOMIZATION)
_OLDEST_VERSION = "1.30"  # the first that has the preStop action sleep without a feature gate


def read(name: str) -> dict[str, Any]:
    """One manifest."""
    manifest: dict[str, Any] = yaml.safe_load((_FOLDER / name).read_text())
    return manifest


@pytest.fixture
def pod() -> dict[str, Any]:
    """The pod template of the Deployment: its metadata and spec."""
    template: dict[str, Any] = read("deployment.yaml")["spec"]["template"]
    return template


@pytest.mark.parametrize("version", [_OLDEST_VERSION, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", _MANIFESTS)
def test_manifests_are_valid_by_the_official_schema(name: str, version: str) -> None:
    """Strict: a field that Kubernetes does not know is an error, since it would silently have no effect."""
    kubernetes_validate.validate(read(name), version, strict=True)


def test_every_manifest_is_applied() -> None:
    """``kubectl apply -k`` applies what the kustomization lists, and it lists every file."""
    assert sorted(read(_KUSTOMIZATION)["resources"]) == _MANIFESTS


@pytest.mark.parametrize("name", ["service.yaml", "poddisruptionbudget.yaml", "networkpolicy.yaml", "deployment.yaml"])
def test_selectors_choose_the_pods_of_the_deployment(name: str, pod: dict[str, Any]) -> None:
    """A selector that matches nothing is valid and does nothing."""
    spec = read(name)["spec"]
    selector = spec.get("selector") or spec["podSelector"]
    labels = selector.get("matchLabels", selector)
    assert labels.items() <= pod["metadata"]["labels"].items()
    assert labels


def test_the_autoscaler_scales_the_deployment() -> None:
    """It names the Deployment by kind and name."""
    deployment, target = read("deployment.yaml"), read("horizontalpodautoscaler.yaml")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


def test_every_port_is_the_one_the_container_listens_on(pod: dict[str, Any]) -> None:
    """Service, probes, network policy and scraping name the same port, and the setting that chooses it agrees."""
    container = pod["spec"]["containers"][0]
    (port,) = container["ports"]
    probes = [container[kind]["httpGet"]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    targets = [entry["targetPort"] for entry in read("service.yaml")["spec"]["ports"]]
    allowed = [entry["port"] for rule in read("networkpolicy.yaml")["spec"]["ingress"] for entry in rule["ports"]]
    assert {*probes, *targets, *allowed} == {port["name"]}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    scraped = pod["metadata"]["annotations"]["prometheus.io/port"]
    assert environment["SERVICE_PORT"] == scraped == str(port["containerPort"])


def test_variables_of_the_container_are_settings(pod: dict[str, Any]) -> None:
    """A misspelt variable would be ignored by the service."""
    names = [entry["name"] for entry in pod["spec"]["containers"][0]["env"]]
    assert {name.removeprefix("SERVICE_").lower() for name in names} <= Settings.model_fields.keys()


def test_a_pod_has_time_to_answer_what_it_accepted(pod: dict[str, Any]) -> None:
    """The grace period holds preStop, the grace and the drain of the settings' defaults, and ten seconds to end."""
    pause_s = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    needed_s = pause_s + defaults["shutdown_grace_s"] + defaults["drain_timeout_s"] + 10
    assert pod["spec"]["terminationGracePeriodSeconds"] >= needed_s


def test_probes_and_scraping_ask_paths_that_answer(service: ServiceProcess, pod: dict[str, Any]) -> None:
    """Each path of the manifests answers 200 on a service that is ready."""
    container = pod["spec"]["containers"][0]
    paths = {container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    paths.add(pod["metadata"]["annotations"]["prometheus.io/path"])
    assert {path: httpx.get(service.url + path).status_code for path in paths} == dict.fromkeys(paths, 200)


def test_the_autoscaler_reads_a_metric_that_exists(service: ServiceProcess) -> None:
    """The pods' metric that the autoscaler scales on is a gauge among the service's own."""
    (metric,) = read("horizontalpodautoscaler.yaml")["spec"]["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in httpx.get(service.url + "/metrics").text.splitlines()
