"""What the image of the EMPAIA app promises. Its entry point does whole jobs in tests/empaia/official."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from helpers.compose import ROOT
from helpers.empaia_image import DOCKERFILE, instruction, started, variables
from helpers.processes import BIN

ALONE = ["unshare", "--net"]
PLAIN = {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def isolated(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where no network is, not even loopback; skips where that cannot be had."""
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a process without network needs root on Linux")
    env = {**PLAIN, "HOME": str(folder)}
    return subprocess.run([*ALONE, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=250)


def test_the_image_is_on_top_of_the_others() -> None:
    """Its base is a target of deploy/Dockerfile by default; it is not root, and nothing of it is secret."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert instruction("ARG") == "BASE=wsi-mmm:cpu" and instruction("FROM") == "${BASE}"
    assert "FROM runtime AS cpu" in (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER [1-9]\d*\n\Z", text, re.MULTILINE)
    assert set(variables()) == {"MODEL", "VENDOR", "HF_HUB_OFFLINE"} and "EMPAIA_" not in text


def test_the_image_has_the_description_of_its_app(tmp_path: Path) -> None:
    """What its build runs without a network writes deploy/empaia/ead.json."""
    built = instruction("RUN --network=none").replace("/home/wsi", str(tmp_path))
    done = isolated(["env", *(f"{name}={value}" for name, value in variables().items()), "sh", "-c", built], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ead.json").read_bytes() == (DOCKERFILE.parent / "ead.json").read_bytes()


@pytest.mark.slow
def test_the_default_model_needs_no_network(tmp_path: Path) -> None:
    """Weights and all else that a run needs are installed: a slide is done where nothing can be reached."""
    done = isolated(["wsi-mmm", "demo", "-o", "demo"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "demo").rglob("*.geojson*"))


def test_a_container_without_a_job_ends_with_one_line(tmp_path: Path) -> None:
    """Started by hand, the entry point names the variable that is missing."""
    done = subprocess.run(
        started(variables()), cwd=tmp_path, env={**PLAIN, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "EMPAIA_APP_API is not set" in done.stderr and len(done.stderr.strip().splitlines()) == 1
