"""The environment of setup.sh, and the platform of the tests with the real ``eats`` before it. Skips without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.eats import DIRECT, OFFICIAL, ROOT, SLIDE, Judge, Platform, write_inputs
from helpers.empaia_image import started, variables
from helpers.processes import running, wait_for
from helpers.wsi_service import FakeService
from wsi_mmm.slides import open_slide


@pytest.fixture(scope="session")
def official() -> Path:
    """Python of the environment with EMPAIA's own code."""
    python = ROOT / "build" / "empaia" / "bin" / "python"
    if not (python.parents[1] / "installed.txt").exists():
        pytest.skip("no environment with empaia-app-test-suite: `make test-empaia` makes it")
    return python


@pytest.fixture(scope="session")
def judge(official: Path) -> Judge:
    """What EMPAIA's models and validator say of values: None when they accept one."""

    def ask(asked: Sequence[tuple[str, Any]]) -> list[str | None]:
        done = subprocess.run(
            [official, OFFICIAL / "judge.py"], input=json.dumps(asked), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        verdicts: list[str | None] = json.loads(done.stdout)
        return verdicts

    return ask


@pytest.fixture(scope="module")
def commands(other_model: Path) -> Mapping[str, Sequence[str]]:
    """Image -> command: the app as its Dockerfile starts it, one with a model of another vendor, and stand-ins."""
    how = ("sound", "reference", "missing", "class", "failure", "silence", "waits")
    made = {f"stand-in-{one}": [sys.executable, str(OFFICIAL / "stand_in.py"), one] for one in how}
    other = variables(MODEL=str(other_model), VENDOR="my_hospital")
    return {**made, "app": started(variables()), "other-app": started(other)}


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a name of its own: the weights of the default one."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    shutil.copytree(ROOT / "wsi_mmm" / "model" / "zoo" / "default", folder)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    (folder / "card.json").write_text(json.dumps({**card, "name": "Nuclei of mine"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def slides(tiny_slide: Path) -> Mapping[str, Path]:
    """Slides of the platform, by id: the synthetic one. A module of tests may have its own."""
    return {SLIDE: tiny_slide}


@pytest.fixture(scope="module")
def platform(
    official: Path,
    commands: Mapping[str, Sequence[str]],
    slides: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Platform]:
    """The platform, running."""
    folder = tmp_path_factory.mktemp("platform")
    port, apps, log = folder / "port", folder / "apps.json", folder / "log"
    apps.write_text(json.dumps(commands))
    with FakeService({name: open_slide(str(path)) for name, path in slides.items()}) as service:
        command = [official, OFFICIAL / "fake_platform.py", port, apps, service.url]
        with running(command, log, env=DIRECT):
            wait_for(port.exists, "the start of the platform", log)
            yield Platform(int(port.read_text()), official, folder)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Folders of a job's inputs, by mode: the synthetic slide; in standalone two regions of interest, too."""
    return write_inputs(tmp_path / "inputs", SLIDE, [(100, 100, 700, 600), (900, 300, 500, 500)])
