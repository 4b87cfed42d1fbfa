"""The compose files as they are written: time to stop, least privilege, a GPU file that fits. Running them is test_docker's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

_ROOT = Path(__file__).parents[2]
_COMPOSE: dict[str, Any] = yaml.safe_load((_ROOT / "docker-compose.yml").read_text())
_GPU: dict[str, Any] = yaml.safe_load((_ROOT / "docker" / "compose.gpu.yml").read_text())
_OURS = sorted(name for name, service in _COMPOSE["services"].items() if "build" in service)


def test_a_stop_leaves_time_to_answer_what_was_accepted() -> None:
    """The grace period holds the grace and the drain of the settings' defaults, and ten seconds to end."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    period = _COMPOSE["services"]["service"]["stop_grace_period"]
    assert period.endswith("s")
    assert float(period.removesuffix("s")) >= defaults["shutdown_grace_s"] + defaults["drain_timeout_s"] + 10


@pytest.mark.parametrize("name", _OURS)
def test_our_containers_have_the_least_privilege(name: str) -> None:
    """Nothing but /tmp and volumes can be written, and no capability can be had."""
    service = _COMPOSE["services"][name]
    assert service["read_only"] is True
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert "no-new-privileges:true" in service["security_opt"]


def test_training_publishes_where_the_service_looks() -> None:
    """Both mount the same volume at /models, and only training may write there."""
    service, train = (_COMPOSE["services"][name]["volumes"] for name in ("service", "train"))
    assert "${MODELS:-models}:/models:ro" in service
    assert "models:/models" in train
    assert "--publish=/models/model.safetensors" in _COMPOSE["services"]["train"]["command"]


@pytest.mark.parametrize("name", sorted(name for name, service in _COMPOSE["services"].items() if "ports" in service))
def test_ports_are_open_to_this_machine_only_unless_told(name: str) -> None:
    """Whoever starts it on a laptop shows it to nobody else."""
    (port,) = _COMPOSE["services"][name]["ports"]
    assert port.startswith(("127.0.0.1:", "${ADDRESS:-127.0.0.1}:"))


def test_only_what_is_asked_for_is_started() -> None:
    """``docker compose up`` starts the service alone; everything else waits for its profile."""
    assert [name for name, service in _COMPOSE["services"].items() if not service.get("profiles")] == ["service"]


def test_the_gpu_file_gives_our_containers_the_gpu() -> None:
    """It changes what the first file declares, and each of ours gets a device."""
    assert sorted(_GPU["services"]) == _OURS
    for service in _GPU["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
