"""Jobs that cannot be done: the platform is told why, in words for a pathologist, and nothing is read or posted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import WSI_ID, Command, Start, rectangle, regions
from .test_faults import failed

FAR = rectangle(9000, 9000, 10, 10)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "postprocessing": ({"mode": "POSTPROCESSING"}, "postprocessing mode"),
    "report": ({"mode": "REPORT"}, "report mode"),
    "no slide": ({"inputs": {"slide": None}}, "no slide"),
    "no regions": ({"inputs": {"regions": None}}, "no regions of interest"),
    "empty regions": ({"inputs": {"regions": regions()}}, "No region"),
    "outside": ({"inputs": {"regions": regions(rectangle(0, 0, 9, 9), FAR)}}, "2 lies outside"),
    "far circle": ({"inputs": {"regions": regions({"type": "circle", "center": [-9, -9], "radius": 9})}}, "1 lies out"),
    "flat": ({"inputs": {"regions": regions(rectangle(5, 5, 0, 9))}}, "no area"),
    "point circle": ({"inputs": {"regions": regions({"type": "circle", "center": [9, 9], "radius": 0})}}, "no area"),
    "line": ({"inputs": {"regions": regions({"type": "line", "coordinates": [[0, 0], [1, 1]]})}}, "1 is no rectangle"),
    "no shape": ({"inputs": {"regions": regions({"type": "circle", "center": [9]})}}, "1 is no rectangle"),
    "endless": ({"inputs": {"regions": regions(rectangle(0, 0, 10**400, 9))}}, "1 is no rectangle"),
    "no items": ({"inputs": {"regions": [1, 2]}}, "No region"),
    "bare slide": ({"inputs": {"slide": {"id": WSI_ID}}}, "description of the slide"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_job_fails_with_words_for_a_pathologist(
    start: Start, command: Command, tmp_path: Path, name: str
) -> None:
    """Wrong modes, missing inputs, regions outside of the slide: one failure that says so; nothing read, nothing
    posted."""
    told, words = WRONG[name]
    platform = start(**told)
    failed(platform, command("--work", str(tmp_path / "work")))
    assert words in platform.message and not platform.outputs
    assert not any("/regions/" in line or line.startswith("POST") for line in platform.log)


@pytest.mark.parametrize("size", [None, {"x": 0, "y": 0}, {"x": -1, "y": 5}, "large"])
def test_a_slide_without_a_resolution(start: Start, command: Command, tmp_path: Path, size: Any) -> None:
    """It fails, and says that it is the resolution."""
    platform = start()
    platform.inputs["slide"]["pixel_size_nm"] = size
    failed(platform, command("--work", str(tmp_path / "work")))
    assert "resolution" in platform.message


@pytest.mark.parametrize("mode", ["", "BATCH", "x" * 5000, 7, None])
def test_a_mode_that_nobody_knows(start: Start, command: Command, tmp_path: Path, mode: Any) -> None:
    """It fails in a short line, however long the platform's word is."""
    platform = start(mode=mode)
    result = command("--work", str(tmp_path / "work"))
    failed(platform, result)
    assert len(result.output) < 600
