"""What the deployment files promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])


def test_the_cluster_is_a_profile_with_scheduler_and_workers(services: dict[str, Any]) -> None:
    """A plain ``up`` starts nothing by surprise."""
    assert {name for name, service in services.items() if "cluster" in service["profiles"]} == {"scheduler", "worker"}
    assert all(service["profiles"] for service in services.values())


def test_ports_are_on_loopback(services: dict[str, Any]) -> None:
    """Whoever reaches a scheduler can run code: nobody else does."""
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_nothing_runs_as_root_or_with_privileges(services: dict[str, Any]) -> None:
    """A user that is not root, no capabilities, a read-only file system."""
    for service in services.values():
        assert re.fullmatch(r"\$\{WSI_MMM_UID:-[1-9]\d+\}:\$\{WSI_MMM_GID:-[1-9]\d+\}", service["user"])
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    assert re.search(r"^USER [1-9]\d+$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)


def test_no_secret_has_a_value(services: dict[str, Any]) -> None:
    """Credentials are handed on from the environment, never written down; the scheduler gets none."""
    for service in services.values():
        for name, value in service["environment"].items():
            assert value is None or name == "HOME"
    assert not [name for name in services["scheduler"]["environment"] if name.startswith("AWS_")]


def test_long_running_services_have_health_checks(services: dict[str, Any]) -> None:
    """Workers start when the scheduler is healthy, not before."""
    assert all("healthcheck" in services[name] for name in ("scheduler", "worker"))
    assert services["worker"]["depends_on"]["scheduler"]["condition"] == "service_healthy"


def test_the_image_copies_only_what_is_there() -> None:
    """Every file that the image is built from exists."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for line in copied for name in line.split())
