"""Jobs on a Dask cluster that the caller holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsi_mmm
from wsi_mmm.errors import Cancelled

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client():
    """A client of a cluster of two worker processes."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as held,
    ):
        yield held


def test_a_submitted_job_gives_the_same_bytes(client, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """submit returns at once; the job shows progress and ends with the report and the very same GeoJSON."""
    job = wsi_mmm.submit(client, tiny_slide, output=tmp_path, block_tiles=2)
    report = job.result(timeout=200)
    [row] = report.slides
    assert row.status == "done", row.error
    assert job.done
    assert job.progress.fraction == 1.0
    assert job.progress.slides_done == 1
    assert (tmp_path / row.id / "result.geojson.gz").read_bytes() == quiet_bytes


def test_a_cancelled_job_stops_and_the_cluster_lives(client, tiny_slide: Path, tmp_path: Path) -> None:
    """cancel ends the job with Cancelled; the same cluster then runs the job to its end."""
    job = wsi_mmm.submit(client, tiny_slide, output=tmp_path, block_tiles=1)
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(timeout=60)
    assert wsi_mmm.submit(client, tiny_slide, output=tmp_path, block_tiles=1).result(timeout=200).exit_code == 0


def test_a_slide_that_fails_on_a_worker_is_one_line(client, tiny_slide: Path, tmp_path: Path) -> None:
    """An error raised on a worker reaches the report as the line it is, and the other slide is done."""
    report = wsi_mmm.submit(client, [tmp_path / "no.svs", tiny_slide], output=tmp_path, tasks=["stain"]).result(200)
    bad, good = report.slides
    assert bad.status == "failed"
    assert "no.svs" in (bad.error or "")
    assert good.status == "done"
