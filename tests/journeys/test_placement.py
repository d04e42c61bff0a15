"""Who reads the tiles does not change what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsi_mmm
from helpers.cluster import PlainCluster
from wsi_mmm.errors import OptionError


def test_tiles_that_went_through_the_cache_give_the_same_bytes(
    tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path
) -> None:
    """Placement pool: extracted into the cache first, then taken from there."""
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path / "out", cache=tmp_path / "cache", placement="pool").slides
    assert row.status == "done", row.error
    assert (tmp_path / "out" / "tiny" / "result.geojson.gz").read_bytes() == quiet_bytes
    assert "extract" in row.extra["stages"] and list((tmp_path / "cache").glob("*/pixels/*/pixels/c/*/*/*"))


def test_a_pool_needs_a_cache(tiny_slide: Path, tmp_path: Path) -> None:
    """The error names the option; so does that of a word which is no placement."""
    with pytest.raises(OptionError, match="--cache"):
        wsi_mmm.run(tiny_slide, output=tmp_path, placement="pool")
    for word in ("moon", "auto"):
        with pytest.raises(OptionError, match="placement is beside or pool"):
            wsi_mmm.run(tiny_slide, output=tmp_path, placement=word)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_with_a_label_do_what_it_says(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """One worker reads, another runs the model: neither does the other's work, and the bytes are the same."""
    pytest.importorskip("distributed")
    with PlainCluster(tmp_path, workers=1, options=("--resources", "GPU=1")) as cluster:
        cluster.add_worker("--resources", "CPU=1")
        with cluster.client() as client:
            client.wait_for_workers(2, timeout=300)
        report = wsi_mmm.run(
            tiny_slide, output=tmp_path / "out", cache=tmp_path / "cache", placement="pool", scheduler=cluster.address
        )
    [row] = report.slides
    assert row.status == "done", row.error
    assert (tmp_path / "out" / "tiny" / "result.geojson.gz").read_bytes() == quiet_bytes
    assert len(row.extra["encoder"]) == 1 and row.extra["stages"]["extract"] > 0
