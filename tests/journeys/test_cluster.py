"""Jobs on a cluster of plain Dask processes: submitted here, watched, awaited and cancelled from anywhere."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import wsi_mmm
from helpers.cluster import PlainCluster, wait_until
from wsi_mmm.engine.executors.job_registry import JobRegistry
from wsi_mmm.errors import Cancelled, ClusterError

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainCluster]:
    """A scheduler and two workers of two threads."""
    with PlainCluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def client(cluster: PlainCluster) -> Iterator[distributed.Client]:
    """A client of that cluster."""
    with cluster.client() as held:
        yield held


@pytest.fixture
def many_slides(tiny_slide: Path, tmp_path: Path) -> list[Path]:
    """So many slides that a job of them is not done before it hears that it is to stop."""
    folder = tmp_path / "many"
    folder.mkdir()
    return [shutil.copy(tiny_slide, folder / f"slide{number}{tiny_slide.suffix}") for number in range(30)]


@pytest.mark.parametrize("detach", [True, False])
def test_a_submitted_job_gives_the_same_bytes(
    client: distributed.Client, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path, detach: bool
) -> None:
    """submit returns at once; the job shows progress and ends with the report and the very same GeoJSON."""
    job = wsi_mmm.submit(client, tiny_slide, output=tmp_path, block_tiles=2, detach=detach)
    report = job.result(timeout=200)
    [row] = report.slides
    assert row.status == "done", row.error
    wait_until(lambda: job.done, "the end of the job", 10)
    assert job.progress.fraction == 1.0
    assert job.progress.slides_done == 1
    assert (tmp_path / row.id / "result.geojson.gz").read_bytes() == quiet_bytes


@pytest.mark.parametrize("detach", [True, False])
def test_a_cancelled_job_stops_and_the_cluster_lives(
    client: distributed.Client, tiny_slide: Path, many_slides: list[Path], tmp_path: Path, detach: bool
) -> None:
    """cancel ends the job with Cancelled in under five seconds; the same cluster then runs one to its end."""
    job = wsi_mmm.submit(client, many_slides, output=tmp_path, block_tiles=1, detach=detach)
    wait_until(lambda: job.progress.tiles_total > 0, "the plan")
    asked = time.monotonic()
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(timeout=60)
    assert time.monotonic() - asked < 5
    again = wsi_mmm.submit(client, tiny_slide, output=tmp_path, block_tiles=1, detach=detach)
    assert again.result(timeout=200).exit_code == 0


def test_a_slide_that_fails_on_a_worker_is_one_line(
    client: distributed.Client, tiny_slide: Path, tmp_path: Path
) -> None:
    """An error raised on a worker reaches the report as the line it is, and the other slide is done."""
    report = wsi_mmm.submit(client, [tmp_path / "no.svs", tiny_slide], output=tmp_path, tasks=["stain"]).result(200)
    bad, good = report.slides
    assert bad.status == "failed"
    assert "no.svs" in (bad.error or "")
    assert good.status == "done"


def test_a_job_outlives_the_process_that_submitted_it(cluster: PlainCluster, tiny_slide: Path, tmp_path: Path) -> None:
    """Another process finds it by its id, sees the same progress and has its report; then it can be forgotten."""
    script = (
        "import sys, wsi_mmm\n"
        "job = wsi_mmm.submit(sys.argv[1], sys.argv[2], output=sys.argv[3], block_tiles=1)\n"
        "print(job.id)\n"
    )
    words = [sys.executable, "-c", script, cluster.address, str(tiny_slide), str(tmp_path)]
    name = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True).stdout.strip()
    with cluster.client() as one, cluster.client() as other:
        jobs = [wsi_mmm.attach(held, name) for held in (one, other)]
        notes = list(jobs[0].watch(0.2))
        assert notes[-1].state == "done" and notes[-1].slides_done == 1
        assert [note.tiles_done for note in notes] == sorted(note.tiles_done for note in notes)
        assert jobs[1].status == notes[-1]
        assert [job.result(60).exit_code for job in jobs] == [0, 0]
        assert name in {note.id for note, fine in wsi_mmm.list_jobs(other) if fine}
        jobs[0].forget()
        with pytest.raises(ClusterError, match="no job"):
            wsi_mmm.attach(other, name)


def test_a_job_is_cancelled_from_elsewhere(cluster: PlainCluster, many_slides: list[Path], tmp_path: Path) -> None:
    """By whoever has its id; a run whose books are kept in its own process can be, too."""
    with cluster.client() as one, cluster.client() as other:
        first = wsi_mmm.submit(one, many_slides, output=tmp_path / "a", block_tiles=1)
        wsi_mmm.attach(other, first.id).cancel()
        with pytest.raises(Cancelled):
            first.result(60)
        second = wsi_mmm.submit(one, many_slides, output=tmp_path / "b", block_tiles=1, detach=False)
        wait_until(lambda: any(note.state == "running" for note in JobRegistry(other).statuses()), "the note of a run")
        [name] = [note.id for note in JobRegistry(other).statuses() if note.state == "running"]
        wsi_mmm.attach(other, name).cancel()
        with pytest.raises(Cancelled):
            second.result(30)


@pytest.mark.parametrize("good", [True, False])
def test_a_run_that_has_ended_is_told_on_the_board(
    client: distributed.Client, cluster: PlainCluster, tiny_slide: Path, tmp_path: Path, good: bool
) -> None:
    """At once, however it ended: as long as it counted as running, other jobs would have a share only."""
    known = {note.id for note in JobRegistry(client).statuses()}

    def heard(event: wsi_mmm.Event) -> None:
        if not good and event.kind == "tile":
            raise KeyboardInterrupt

    with contextlib.nullcontext() if good else pytest.raises((KeyboardInterrupt, Cancelled)):
        wsi_mmm.run(tiny_slide, output=tmp_path, block_tiles=1, scheduler=cluster.address, progress=heard)
    [note] = [note for note in JobRegistry(client).statuses() if note.id not in known]
    assert note.state == ("done" if good else "cancelled")


def test_a_job_whose_books_were_on_a_worker_that_died_goes_on(
    client: distributed.Client, cluster: PlainCluster, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path
) -> None:
    """Another worker keeps them, what is done stays done, and the bytes are the same."""
    job = wsi_mmm.submit(client, tiny_slide, output=tmp_path, block_tiles=1)
    wait_until(lambda: job.status.tiles_done > 0, "the first tiles")
    subprocess.run(["kill", "-9", job.status.where.rpartition(":")[2]], check=True)
    report = job.result(200)
    assert job.status.tries == 2
    assert [row.status for row in report.slides] == ["done"]
    assert (tmp_path / "tiny" / "result.geojson.gz").read_bytes() == quiet_bytes


def test_the_command_line_leaves_a_job_to_the_cluster(cluster: PlainCluster, tiny_slide: Path, tmp_path: Path) -> None:
    """run --detach says its id; jobs watch follows it to its end, list shows it, forget drops it."""
    where = ["--scheduler", cluster.address]

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "wsi_mmm", *words, *where]
        return subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout

    name = said("run", str(tiny_slide), "-o", str(tmp_path), "--detach").split()[1]
    assert said("jobs", "watch", name).splitlines()[-1].startswith("done  1/1 slides")
    assert f"{name}\tdone\t1/1" in said("jobs", "list")
    said("jobs", "forget", name)
    assert name not in said("jobs", "list")
