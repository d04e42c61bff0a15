"""A first slide that fails early, with a tissue mask of real size: it fails alone, and the summary is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wsi_mmm
from helpers.commands import invoke
from helpers.made_slides import Made, small_slide  # noqa: F401  (a fixture)

PIPE = 1 << 16
"""Bytes that a pipe of Linux holds: messages beyond arrive in portions."""


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """A mask picture of the small slide in which every pixel is by chance: larger than a pipe, however packed."""
    path = tmp_path / "mask.png"
    Image.fromarray((np.random.default_rng(4).random((820, 1100)) < 0.6).astype(np.uint8) * 255).save(path)
    assert path.stat().st_size > PIPE
    return path


@pytest.mark.parametrize("good", [False, True], ids=["alone", "beside a good slide"])
def test_a_slide_without_resolution_fails_alone(good: bool, small_slide: Made, mask: Path, tmp_path: Path) -> None:  # noqa: F811
    """Exit code 4 when it is alone, 3 beside a good slide; each has its line, the report has every row."""
    from wsi_mmm.slides.fake import TiffForm, write_tiff

    write_tiff(tmp_path / "bare.tiff", [small_slide.image], TiffForm(mpp=None))
    write_tiff(tmp_path / "coarse.tiff", [small_slide.image], TiffForm(mpp=1.2))
    names = [tmp_path / "bare.tiff", tmp_path / "coarse.tiff", *([small_slide.path] if good else [])]
    (tmp_path / "m.csv").write_text("slide,mask\n" + "".join(f"{name},{mask}\n" for name in names))
    out = tmp_path / "out"
    done = invoke("run", tmp_path / "m.csv", "-o", out, "--task", "stain", "--device", "cpu")
    assert done.exit_code == (3 if good else 4) and "unexpected" not in done.output
    assert "bare failed" in done.stderr and "--mpp-override" in done.stderr
    assert "coarse failed: mpp 0.5 is more than twice as fine as the slide (1.2)" in done.stderr
    assert ("1 done, 2 failed" if good else "2 failed") in done.stdout
    rows = {row["id"]: row for row in json.loads((out / "report.json").read_text())["slides"]}
    assert [rows[name]["status"] for name in ("bare", "coarse")] == ["failed"] * 2 and len(rows) == len(names)
    if good:
        assert rows["small"]["status"] == "done" and rows["small"]["tiles"] > 0


def test_no_mask_travels_through_a_pipe() -> None:
    """Nothing in the package forks, and of the engine only executors start processes: tissue is found in place."""
    starts = re.compile(r"os\.(fork|pipe)|multiprocessing|subprocess|ProcessPool")
    package = Path(wsi_mmm.__file__).parent
    found = {path.relative_to(package).parts[0] for path in package.rglob("*.py") if starts.search(path.read_text())}
    assert found <= {"engine", "model", "empaia", "cli"}, found
    engine = [path.name for path in (package / "engine").rglob("*.py") if starts.search(path.read_text())]
    assert set(engine) <= {"isolated.py", "dask_local.py"}
