"""Slides whose tiles the model's device decodes, from the file to what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsi_mmm
from wsi_mmm.slides.fake import synthetic_slide


def published(slide: Path, output: Path, **options: Any) -> tuple[bytes, dict[str, Any]]:
    """Run with the device's decoder; the GeoJSON's bytes and what the report says beside."""
    [row] = wsi_mmm.run(slide, output=output, **{"decode": "device", **options}).slides
    assert row.status == "done", row.error
    return (output / row.id / "result.geojson.gz").read_bytes(), row.extra


def test_the_slides_own_pixels_give_the_same_bytes(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """Where nothing is reduced, the CPU's two decoders agree; the report says who decoded."""
    got, extra = published(tiny_slide, tmp_path)
    assert got == quiet_bytes
    assert extra["decode"] == "decoded on the model's device (cpu), as asked for"
    assert extra["stages"]["decode"] > 0
    assert json.loads((tmp_path / "tiny" / "slide.json").read_text())["decode"] == "device"


def test_the_default_says_that_the_cpu_decodes(quiet_run: tuple[Path, wsi_mmm.RunReport]) -> None:
    """Nothing was measured, and the report says why."""
    assert quiet_run[1].slides[0].extra["decode"] == "decoded on the CPU, where the model runs"


def test_the_cut_of_the_work_changes_no_byte(tiny_slide: Path, tmp_path: Path) -> None:
    """At twice the slide's mpp, where the device averages what the reader's codec would have reduced."""
    options = {"mpp": 1.0, "tile_size": 256, "overlap": 32, "tissue": "none"}
    one, other = (published(tiny_slide, tmp_path / str(n), block_tiles=n, **options)[0] for n in (1, 3))
    assert one == other


def test_a_slide_that_is_not_handed_over_is_decoded_by_the_cpu(tmp_path: Path) -> None:
    """JPEG 2000 beside JPEG in one run: its result is the one without the option, and the report says why."""
    odd, plain = tmp_path / "odd.tiff", tmp_path / "plain.tiff"
    synthetic_slide(odd, seed=1, width=700, height=600, nuclei=30, variant="jpeg2000")
    synthetic_slide(plain, seed=1, width=700, height=600, nuclei=30)
    report = wsi_mmm.run([odd, plain], output=tmp_path / "both", decode="device")
    words = {row.id: row.extra["decode"] for row in report.slides}
    assert words["odd"] == "decoded on the CPU: compressed with JPEG 2000"
    assert "device" in words["plain"]
    assert published(odd, tmp_path / "alone", decode="cpu")[0] == (tmp_path / "both/odd/result.geojson.gz").read_bytes()


def test_embedding_decodes_there_too(tiny_slide: Path, tmp_path: Path) -> None:
    """Features equal those of the CPU's tiles at the slide's own mpp."""
    found = []
    for decode in ("cpu", "device"):
        report = wsi_mmm.embed(tiny_slide, output=tmp_path / decode, decode=decode, export="h5")
        assert report.exit_code == 0
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / decode / "tiny" / "features.h5") as file:
            found.append(file["features"][:])
    assert np.array_equal(*found)


def test_a_corrupt_tile_is_listed_as_without(tiny_slide: Path, tmp_path: Path) -> None:
    """The same failures, the same bytes, the same exit code."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "corrupt.tiff"
    shutil.copy(tiny_slide, path)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        number = 2 * -(-page.imagewidth // page.tilewidth) + 2
        start, count = page.dataoffsets[number], page.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(start + count // 2)
        file.write(np.random.default_rng(0).bytes(count // 4))
    found = {}
    for decode in ("cpu", "device"):
        report = wsi_mmm.run(path, output=tmp_path / decode, tissue="none", decode=decode)
        [row] = report.slides
        assert row.status == "partial" and report.exit_code == 3
        found[decode] = row.extra["failures"], (tmp_path / decode / row.id / "result.geojson.gz").read_bytes()
    assert found["cpu"] == found["device"]
