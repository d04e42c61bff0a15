"""The app itself, started by the real ``eats``, its outputs judged by EMPAIA's own models and validator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.eats import SLIDE, Platform, as_triangle, ran, said, write_inputs
from wsi_mmm.cli.main import app
from wsi_mmm.slides.fake import SyntheticNuclei

pytestmark = [pytest.mark.empaia, pytest.mark.timeout(300)]


def about(outputs: Mapping[str, Any], key: str) -> list[str]:
    """What the items of an output refer to."""
    return [one["reference_id"] for one in outputs[key]["items"]]


def test_a_whole_slide(platform: Platform, inputs: Path, tmp_path: Path) -> None:
    """Preprocessing: the official validator accepts it; every nucleus has a class and a confidence, in few requests."""
    seen, outputs = ran(platform, "app", inputs, tmp_path / "out", "preprocessing")
    nuclei = [one["id"] for one in outputs["nuclei_objects"]["items"]]
    assert len(nuclei) > 50 and len(set(nuclei)) == len(nuclei)
    assert about(outputs, "nuclei_classes") == about(outputs, "nuclei_confidences") == nuclei
    assert outputs["nuclei_slide_count"]["value"] == len(nuclei)
    tissue = {one["id"] for one in outputs["tissue"]["items"]}
    assert tissue and set(about(outputs, "stain_classes")) <= tissue
    level = outputs["nuclei_map"]["levels"][0]
    across, down = (level[f"position_max_{side}"] - level[f"position_min_{side}"] + 1 for side in "xy")
    assert seen["tiles"] == {"nuclei_map": across * down}
    items = [one for one in seen["requests"] if one.startswith("POST") and one.endswith("/items")]
    assert len(items) <= 5  # one for each collection
    assert [one for one in seen["requests"] if one.startswith("PUT") and one.endswith(("finalize", "failure"))] == [
        "PUT /finalize"
    ]


def test_regions_of_interest(platform: Platform, inputs: Path, tmp_path: Path) -> None:
    """Standalone: accepted by the official validator; a count for each region, and no nucleus from elsewhere."""
    _, outputs = ran(platform, "app", inputs, tmp_path / "out", "standalone")
    regions = json.loads((inputs / "standalone" / "regions.json").read_text())["items"]
    assert about(outputs, "nuclei_counts") == about(outputs, "nuclei_densities") == [one["id"] for one in regions]
    counts = [one["value"] for one in outputs["nuclei_counts"]["items"]]
    assert sum(counts) == len(outputs["nuclei_objects"]["items"]) and min(counts) > 0
    for one in outputs["nuclei_objects"]["items"]:
        assert any(touches(one["coordinates"], region) for region in regions)


def test_another_model(platform: Platform, other_model: Path, tiny_truth: SyntheticNuclei, tmp_path: Path) -> None:
    """A model's folder and `wsi-mmm empaia init` make an app: another vendor, polygons as regions; a validated job."""
    done = CliRunner().invoke(
        app,
        ["empaia", "init", str(other_model), "-o", str(tmp_path), "--vendor", "my_hospital", "--regions", "polygon"],
    )
    assert done.exit_code == 0, done.output
    ead = tmp_path / "ead.json"
    assert json.loads(ead.read_text())["namespace"] == "org.empaia.my_hospital.Nuclei_of_mine.v3.0"
    inputs = write_inputs(tmp_path / "inputs", SLIDE, [(200, 100, 1000, 1000)], as_triangle)
    _, outputs = ran(platform, "other-app", inputs, tmp_path / "out", "standalone", ead=ead)
    x, y = tiny_truth.centers.T - [[200], [100]]
    there = int(((x > 0) & (y > x) & (y < 1000)).sum())
    found = outputs["nuclei_counts"]["items"][0]["value"]
    assert found == len(outputs["nuclei_objects"]["items"]) and abs(found - there) <= 2 < there
    assert outputs["nuclei_classes"]["items"][0]["value"].startswith("org.empaia.my_hospital.Nuclei_of_mine.v3.0.")


def test_a_region_outside_of_the_slide(platform: Platform, inputs: Path, tmp_path: Path) -> None:
    """The job fails with words for whoever drew the region, and the app ends with 1."""
    there = write_inputs(tmp_path / "there", SLIDE, [(9000, 9000, 10, 10)])
    done = platform.run("app", there, tmp_path / "out", mode="standalone")
    assert done.returncode == 1 and "Error while Job execution" in done.stderr
    job = platform.job(said(done)["EMPAIA_JOB_ID"])
    assert (job["status"], job["outputs"]) == ("FAILED", {})
    assert job["error_message"] == "Region of interest 1 lies outside of the slide, or has no area."
    assert platform.seen(job["id"])["exit"] == 1


def touches(corners: list[list[int]], region: Mapping[str, Any]) -> bool:
    """Whether the rectangle round an outline meets a region."""
    (x, y), width, height = region["upper_left"], region["width"], region["height"]
    across, down = zip(*corners, strict=True)
    return min(across) <= x + width and max(across) >= x and min(down) <= y + height and max(down) >= y
