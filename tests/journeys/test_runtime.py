"""A run through ONNX Runtime finds what a plain run finds, and its report says how it was run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from wsi_mmm import api


@pytest.mark.slow
def test_onnx_finds_what_eager_finds(tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of objects but for a few at the thresholds; the file is kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counts = {}
    for runtime in ("eager", "onnx"):
        out = tmp_path / runtime
        api.run(tiny_slide, output=out, tasks="nuclei", tile_size=128, runtime=runtime)
        with gzip.open(out / tiny_slide.stem / "result.geojson.gz") as file:
            counts[runtime] = len(json.load(file)["features"])
        [row] = json.loads((out / "report.json").read_text())["slides"]
        [facts] = row["encoder"]
        assert (facts["runtime"], facts["norms"].split(" ", 3)[3]) == (runtime, "folded into convolutions")
    assert counts["eager"] > 20
    assert abs(counts["onnx"] - counts["eager"]) <= 0.02 * counts["eager"]
    assert len(list((tmp_path / "cache" / "wsi-mmm" / "onnx").glob("*.onnx"))) == 1
