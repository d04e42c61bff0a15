"""The real ``eats`` command line of EMPAIA, before a platform of ours; see tests/empaia/official."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "tests" / "empaia" / "official"
EAD = ROOT / "deploy" / "empaia" / "ead.json"
Judge = Callable[[Sequence[tuple[str, Any]]], list[str | None]]
"""What EMPAIA's own code says of values, each with the name of its model or "ead"; None: accepted."""

SLIDE = "b10648a7-340d-43fc-a2d9-4d91cc86f33f"  # the synthetic one
ROI = "org.empaia.global.v1.classes.roi"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # the services are on this machine


@dataclass(frozen=True)
class Platform:
    """Our platform, running; ``folder`` is where its commands work."""

    port: int
    python: Path
    folder: Path

    def eats(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the real ``eats``."""
        command = map(str, [self.python, OFFICIAL / "eats.py", self.port, *words])
        return subprocess.run(
            list(command), cwd=self.folder, env={**os.environ, **DIRECT}, capture_output=True, text=True, timeout=850
        )

    def app(self, image: str, ead: Path = EAD) -> str:
        """The id of an image that is registered as an app now."""
        return said(self.eats("apps", "register", ead, image))["APP_ID"]

    def run(
        self, image: str, inputs: Path, out: Path, *, mode: str = "preprocessing", ead: Path = EAD
    ) -> subprocess.CompletedProcess[str]:
        """Register the app and run a job of it from beginning to end, its outputs exported to ``out``."""
        return self.eats("jobs", "exec", self.app(image, ead), inputs / mode, out, "--job-mode", mode)

    def job(self, job_id: str) -> dict[str, Any]:
        """What the platform says of a job."""
        return self._get(f"mds-api/v3/jobs/{job_id}")

    def seen(self, job_id: str) -> dict[str, Any]:
        """What our platform saw of a job's process."""
        return self._get(f"seen/{job_id}")

    def _get(self, path: str) -> dict[str, Any]:
        with _OPENER.open(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def ran(
    platform: Platform, image: str, inputs: Path, out: Path, mode: str, *, ead: Path = EAD
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What our platform saw of a job that EMPAIA's validator accepted, and its outputs as `eats` exported them."""
    done = platform.run(image, inputs, out, mode=mode, ead=ead)
    job_id = said(done)["EMPAIA_JOB_ID"]
    seen, job = platform.seen(job_id), platform.job(job_id)
    assert done.returncode == 0, (done.stderr, seen, job)
    assert (job["status"], job["input_validation_status"], job["output_validation_status"]) == ("COMPLETED",) * 3
    assert seen["exit"] == 0 and said(done)["EMPAIA_TOKEN"] not in seen["output"]
    outputs = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(outputs) == set(json.loads(ead.read_text())["modes"][mode]["outputs"])
    return seen, outputs


def said(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The variables that a command of ``eats`` printed."""
    assert "=" in done.stdout, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


Box = tuple[int, int, int, int]


def as_rectangle(box: Box) -> dict[str, Any]:
    """A region of interest (x, y, width, height) as one of the platform's rectangles."""
    x, y, width, height = box
    return {"type": "rectangle", "upper_left": [x, y], "width": width, "height": height}


def as_triangle(box: Box) -> dict[str, Any]:
    """Its lower left half as a polygon."""
    x, y, width, height = box
    return {"type": "polygon", "coordinates": [[x, y], [x + width, y + height], [x, y + height]]}


def write_inputs(
    folder: Path, wsi: str, boxes: Sequence[Box], shape: Callable[[Box], dict[str, Any]] = as_rectangle
) -> Path:
    """Inputs of jobs in ``folder``/MODE: the slide; for standalone regions (x, y, width, height) with their class."""
    ids = [str(uuid.uuid4()) for _ in boxes]
    regions = [
        {**shape(box), "id": one, "name": "region", "reference_id": wsi, "reference_type": "wsi", "npp_created": 500.0}
        for one, box in zip(ids, boxes, strict=True)
    ]
    roi = [{"type": "class", "value": ROI, "reference_id": one, "reference_type": "annotation"} for one in ids]
    slide = {"type": "wsi", "path": f"/data/{wsi}", "id": wsi, "tissue": "SKIN", "stain": "H_AND_E"}
    files: dict[str, Any] = {
        "preprocessing/slide": slide,
        "standalone/slide": slide,
        "standalone/regions": {"id": str(uuid.uuid4()), "item_type": shape(boxes[0])["type"], "items": regions},
        "standalone/roi_classes": {"item_type": "class", "items": roi},
    }
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder
