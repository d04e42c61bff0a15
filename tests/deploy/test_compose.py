"""What docker-compose.yml and the images promise."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest

from helpers.compose import ROOT, load

PROFILES = {
    "cluster": {"scheduler", "worker"},
    "gpu": {"scheduler", "worker-gpu"},
    "storage": {"s3", "redis", "juicefs"},
    "tools": {"wsi-mmm"},
}
SCRIPTS = sorted(str(path.relative_to(ROOT)) for part in ("deploy", "tests") for path in (ROOT / part).rglob("*.sh"))
SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WSI_MMM_REDIS_PASSWORD"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return load()


def test_every_service_is_in_a_profile(services: dict[str, Any]) -> None:
    """A plain ``up`` starts nothing by surprise."""
    for profile, names in PROFILES.items():
        assert {name for name, service in services.items() if profile in service["profiles"]} == names
    assert set().union(*PROFILES.values()) == set(services)


def test_ports_are_on_loopback(services: dict[str, Any]) -> None:
    """Whoever reaches a scheduler can run code: nobody else does. Redis is not published at all."""
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in services["redis"]


def test_nothing_runs_as_root_or_with_privileges(services: dict[str, Any]) -> None:
    """A user that is not root, no capabilities, a read-only file system; JuiceFS alone is root, for mounting."""
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"] is True and "privileged" not in service
        assert "no-new-privileges:true" in service["security_opt"]
        if name == "juicefs":
            assert service["cap_add"] == ["SYS_ADMIN"] and service["user"] == "0:0"
        else:
            assert re.fullmatch(r"\$\{WSI_MMM_UID:-[1-9]\d+\}:\$\{WSI_MMM_GID:-[1-9]\d+\}", service["user"])
            assert "cap_add" not in service
    stages = (ROOT / "deploy" / "Dockerfile").read_text().split("\nFROM ")
    for last in (stage for stage in stages if re.match(r"runtime AS (cpu|gpu)\n", stage)):
        assert re.search(r"^USER [1-9]\d+$", last, re.MULTILINE)


def test_no_secret_has_a_value(services: dict[str, Any]) -> None:
    """Credentials are handed on from the environment, never written down, never a default; the scheduler has none."""
    for service in services.values():
        for name, value in service["environment"].items():
            secret = re.search("KEY|SECRET|TOKEN|PASS|AUTH|USER", name)
            if secret and value is not None:
                assert re.fullmatch(r"\$\{(\w+)-\}", value), f"{name} has a default"
                assert value[2:-2] in SECRETS
    assert set(services["scheduler"]["environment"]) == {"HOME", "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH"}


def test_long_running_services_have_health_checks(services: dict[str, Any]) -> None:
    """What depends on a service starts when that is healthy, not before."""
    assert all("healthcheck" in service for name, service in services.items() if name != "wsi-mmm")
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert set(service["profiles"]) <= set(services[needed]["profiles"])  # else its profile does not start


def test_images_are_pinned(services: dict[str, Any]) -> None:
    """Those of others by an exact version, ours by what they are built from."""
    for service in services.values():
        image = service["image"]
        assert "build" in service if image.startswith("wsi-mmm:") else re.search(r":\D*\d+\D\d+", image), image
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-bookworm$", text, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert all(base in stages or base == "python:${PYTHON}" for base in bases)
    assert {service["build"]["target"] for service in services.values() if "build" in service} <= stages
    assert all("-c constraints.txt" in line or "--no-deps ." in line for line in re.findall(r"pip install.*", text))


def test_no_image_comes_from_where_it_was_deleted(services: dict[str, Any]) -> None:
    """MinIO's images are gone from Docker Hub: no file of deployment may name one, nor its command."""
    assert services["s3"]["image"].startswith("chrislusf/seaweedfs:")
    files = [ROOT / "docker-compose.yml", *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
    named = [str(path.relative_to(ROOT)) for path in files if re.search(r"minio/|minio server", path.read_text())]
    assert not named


def test_the_s3_server_keeps_everything_in_its_volume(services: dict[str, Any]) -> None:
    """Its file system is read-only: its folder is its volume, and its port that of the health check."""
    s3 = services["s3"]
    command = s3["entrypoint"][-1]
    inside = {volume.rsplit(":", 1)[1] for volume in s3["volumes"]}
    assert set(re.findall(r"-dir=(\S+)", command)) == inside
    port = re.findall(r"-s3\.port=(\d+)", command)
    assert port == ["9000"] and s3["ports"] == ["127.0.0.1:9000:9000"]
    assert "127.0.0.1:9000/" in s3["healthcheck"]["test"][-1]


def test_the_image_copies_only_what_is_there() -> None:
    """Every file that the image is built from exists, and is let through to the builder."""
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.+) \S+$", text, re.MULTILINE)
        for name in line.split()
    }
    let_through = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text()
    assert len(copied) >= 5
    for name in copied:
        assert (ROOT / name).exists()
        assert any(f"!{part}\n" in let_through for part in (name, name.split("/")[0]))


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("docker-compose", ["docker-compose", "--profile", "storage", "--profile", "gpu", "config", "--quiet"]),
        ("hadolint", ["hadolint", "deploy/Dockerfile", "deploy/empaia/Dockerfile"]),
        (
            "shellcheck",
            [
                "shellcheck",
                *SCRIPTS,
            ],
        ),
    ],
)
def test_other_programs_find_nothing_wrong(program: str, command: list[str]) -> None:
    """Compose itself, and linters of Dockerfiles and shell scripts, where they are installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
