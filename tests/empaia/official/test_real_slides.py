"""Jobs on real slides under the real ``eats``; skipped where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from conftest import RealData
from helpers.eats import Platform, ran, write_inputs

pytestmark = [pytest.mark.empaia, pytest.mark.slow, pytest.mark.timeout(900)]
SLIDES = {
    "cmu-1-small-region.svs": ("c10648a7-340d-43fc-a2d9-4d91cc86f33f", [(500, 500, 1200, 1200), (100, 2000, 600, 600)]),
    "metaplasia_trypsin_IHC.svs": ("d10648a7-340d-43fc-a2d9-4d91cc86f33f", [(2000, 2000, 2500, 2500)]),
}


@pytest.fixture(scope="module")
def slides(real_data: RealData) -> Mapping[str, Path]:
    """Two real slides."""
    return {wsi: real_data.slide(name) for name, (wsi, _) in SLIDES.items()}


@pytest.mark.parametrize("mode", ["preprocessing", "standalone"])
@pytest.mark.parametrize("name", SLIDES)
def test_a_job_on_a_real_slide(platform: Platform, tmp_path: Path, name: str, mode: str) -> None:
    """The official validator accepts the outputs; nuclei are found, each with its class and confidence."""
    inputs = write_inputs(tmp_path / "inputs", *SLIDES[name])
    seen, outputs = ran(platform, "app", inputs, tmp_path / "out", mode)
    count = outputs["nuclei_objects"]["item_count"]
    assert count == outputs["nuclei_classes"]["item_count"] == outputs["nuclei_confidences"]["item_count"] > 0
    regions = sum("/regions/" in one or "/tiles/" in one for one in seen["requests"])
    posts = sum(one.startswith("POST") for one in seen["requests"])
    print(f"{name} {mode}: {count} nuclei, {regions} pictures, {posts} posts, {len(seen['requests'])} requests")
