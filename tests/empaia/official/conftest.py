"""The environment of setup.sh, and the platform of the tests with the real ``eats`` before it. Skips without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.eats import DIRECT, OFFICIAL, ROOT, Judge, Platform
from helpers.processes import running, wait_for
from helpers.wsi_service import FakeService
from wsi_mmm.slides import open_slide

SLIDE = "b10648a7-340d-43fc-a2d9-4d91cc86f33f"
ROI = "org.empaia.global.v1.classes.roi"


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
def commands() -> Mapping[str, Sequence[str]]:
    """Image -> command. A module of tests may have its own."""
    how = ("sound", "reference", "missing", "class", "failure", "silence", "waits")
    return {f"stand-in-{one}": [sys.executable, str(OFFICIAL / "stand_in.py"), one] for one in how}


@pytest.fixture(scope="module")
def platform(
    official: Path, commands: Mapping[str, Sequence[str]], tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """The platform, with the synthetic slide."""
    folder = tmp_path_factory.mktemp("platform")
    port, apps, log = folder / "port", folder / "apps.json", folder / "log"
    apps.write_text(json.dumps(commands))
    with FakeService({SLIDE: open_slide(str(tiny_slide))}) as slides:
        command = [official, OFFICIAL / "fake_platform.py", port, apps, slides.url]
        with running(command, log, env=DIRECT):
            wait_for(port.exists, "the start of the platform", log)
            yield Platform(int(port.read_text()), official, folder)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Folders of a job's inputs, by mode: the slide; in standalone two regions of interest and their classes, too."""
    boxes = {"11111111-1111-4111-8111-111111111111": (100, 100, 700, 600),
             "22222222-2222-4222-8222-222222222222": (900, 300, 500, 500)}  # fmt: skip
    regions = [
        {"type": "rectangle", "id": one, "name": "region", "upper_left": [x, y], "width": width, "height": height,
         "reference_id": SLIDE, "reference_type": "wsi", "npp_created": 500.0}
        for one, (x, y, width, height) in boxes.items()
    ]  # fmt: skip
    roi = [{"type": "class", "value": ROI, "reference_id": one, "reference_type": "annotation"} for one in boxes]
    files: dict[str, Any] = {
        "slide": {"type": "wsi", "path": "/data/tiny.tiff", "id": SLIDE, "tissue": "SKIN", "stain": "H_AND_E"},
        "regions": {"id": "33333333-3333-4333-8333-333333333333", "item_type": "rectangle", "items": regions},
        "roi_classes": {"item_type": "class", "items": roi},
    }
    for mode, names in {"standalone": list(files), "preprocessing": ["slide"]}.items():
        folder = tmp_path / "inputs" / mode
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    return tmp_path / "inputs"
