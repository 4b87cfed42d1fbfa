"""The dashboard, the alerts and the scrape configuration: they name what there is, and Prometheus itself finds them sound."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.servers.service_process import ServiceProcess
from service.observability.metrics import METRICS

_ROOT = Path(__file__).parents[2]
_PROMETHEUS = _ROOT / "docker" / "prometheus"
_GRAFANA = _ROOT / "docker" / "grafana"
_EXAMPLES = ("alerts_test.yml", "alerts_long_test.yml")
_PATIENCE_S = 60.0  # no expectation of speed: only the end of a test that would hang

COMPOSE: dict[str, Any] = yaml.safe_load((_ROOT / "docker-compose.yml").read_text())["services"]
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((_PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((_GRAFANA / "dashboards" / "service.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing; Debian's package prometheus has it"
)


def metrics_in(text: str) -> set[str]:
    """Give the declared metrics that a query or a text names; a name that is none of them stays as it is."""
    names = re.findall(r"\bservice_[a-z_]+", text)
    return {name if name in METRICS else re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def queries() -> Iterator[tuple[str, str]]:
    """Give title and query of every panel, with the dashboard's variables filled in."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")


def promtool(*arguments: str, folder: Path = _PROMETHEUS) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    """A metric that is added gets a panel, and one that is renamed does not leave an empty one behind."""
    assert {name for _, query in queries() for name in metrics_in(query)} == set(METRICS)


def test_alerts_name_metrics_that_there_are() -> None:
    """No alert waits for a metric that nobody writes."""
    for alert in ALERTS:
        assert metrics_in(json.dumps(alert)) <= set(METRICS), alert["alert"]


def test_every_alert_says_how_grave_it_is_and_what_to_do() -> None:
    """Each has a severity, a summary and a description; names are not used twice."""
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert alert["annotations"].keys() == {"summary", "description"}, alert["alert"]
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)


def test_every_alert_has_an_example_in_which_it_fires() -> None:
    """The examples let each alert fire once at least, so an expression that never can is found."""
    cases = [case for examples in _EXAMPLES for case in yaml.safe_load((_PROMETHEUS / examples).read_text())["tests"]]
    expected = [test for case in cases for test in case["alert_rule_test"]]
    assert {test["alertname"] for test in expected if test.get("exp_alerts")} == {alert["alert"] for alert in ALERTS}


@needs_promtool
def test_prometheus_accepts_its_configuration() -> None:
    """The configuration and the rules that it loads have no mistake."""
    promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    """The examples hold."""
    promtool("test", "rules", *_EXAMPLES)


@needs_promtool
def test_every_query_of_the_dashboard_is_sound(tmp_path: Path) -> None:
    """Prometheus can parse each; they are handed to it as recording rules."""
    rules = [{"record": f"panel:{index}", "expr": query} for index, (_, query) in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "rules.yml", folder=tmp_path)


def test_panels_have_a_place_and_a_meaning_of_their_own() -> None:
    """No two share an id or a part of the page, and each says what it shows."""
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    assert all(panel["description"] for panel in PANELS)


def test_the_profile_puts_every_file_where_its_reader_looks() -> None:
    """What compose mounts exists here, and Grafana's provisioning names the paths that it is mounted at."""
    assert COMPOSE["prometheus"]["profiles"] == COMPOSE["grafana"]["profiles"] == ["monitoring"]
    mounts = [mount.split(":") for name in ("prometheus", "grafana") for mount in COMPOSE[name]["volumes"]]
    folders = {inside: _ROOT / outside for outside, inside, *_ in mounts if outside.startswith(".")}
    assert all(folder.is_dir() for folder in folders.values())
    assert (folders["/etc/prometheus"] / "prometheus.yml").is_file()
    provisioning = folders["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "service.yml").read_text())["providers"]
    dashboards = folders[provider["options"]["path"]]
    home = COMPOSE["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / Path(home).name).is_file()
    assert str(Path(home).parent) == provider["options"]["path"]


def test_prometheus_finds_the_service_and_grafana_finds_prometheus() -> None:
    """Names, ports, the job and the interval agree between the files that name them."""
    configuration = yaml.safe_load((_PROMETHEUS / "prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) < set(COMPOSE)
    assert COMPOSE["service"]["ports"][0].endswith(f":{discovery['port']}")
    jobs = {match for alert in ALERTS for match in re.findall(r'job="(\w+)"', alert["expr"])}
    assert jobs == {job["job_name"]}
    (source,) = yaml.safe_load((_GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert COMPOSE[host]["ports"][0].endswith(f":{port}")
    assert source["jsonData"]["timeInterval"] == configuration["global"]["scrape_interval"]


def test_monitoring_is_for_this_machine_only() -> None:
    """Neither port is open to the network, and neither container has more rights than it needs."""
    for name in ("prometheus", "grafana"):
        container = COMPOSE[name]
        assert all(port.startswith("127.0.0.1:") for port in container["ports"])
        assert container["read_only"] is True
        assert container["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in container["security_opt"]


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[str]:
    """Run a real Prometheus with the project's rules, which scrapes ``target`` each second; give its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(_PROMETHEUS / "alerts.yml")],
        "scrape_configs": [{"job_name": "prediction", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    """Ask until there is an answer; give it, or an empty list after a minute."""
    limit = time.monotonic() + _PATIENCE_S
    while time.monotonic() < limit:
        try:
            response = httpx.get(f"{prometheus}/api/v1/query", params={"query": query})
        except httpx.TransportError:  # it does not listen yet
            continue
        if response.status_code == 503:  # it listens, and opens its storage
            continue
        answer = response.json()
        assert answer["status"] == "success", (query, answer)
        result: list[dict[str, Any]] = answer["data"]["result"]
        if result:
            return result
        time.sleep(0.2)
    return []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing; it is Debian's package of that name")
def test_every_panel_has_data_from_a_service_that_is_used(
    checkpoint_path: Path, image_paths: list[Path], tmp_path: Path
) -> None:
    """A real Prometheus scrapes the real service, and no query comes back empty but the GPU's and yesterday's."""
    with (
        ServiceProcess(checkpoint_path, workers=2) as service,
        running_prometheus(tmp_path, service.url.removeprefix("http://")) as prometheus,
    ):
        assert ask(prometheus, 'up{job="prediction"} == 1')
        for path in image_paths:  # the scrapes before these requests and after them are what a rate is made of
            httpx.post(f"{service.url}/predict", content=path.read_bytes(), headers={"Content-Type": "image/png"})
            httpx.post(f"{service.url}/predict", content=b"no image", headers={"Content-Type": "image/png"})
        assert ask(prometheus, 'rate(service_refusals_total{reason="invalid_image"}[1m]) > 0')
        for title, query in queries():
            if "GPU" not in title and "offset" not in query:
                assert ask(prometheus, query), (title, query)
        assert httpx.get(f"{prometheus}/api/v1/alerts").json()["data"]["alerts"] == []
