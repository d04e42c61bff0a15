"""Workers, schedulers, disks and slides that go away in the middle of a run: nothing is lost, failures are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import wsi_mmm
from helpers.cluster import PlainCluster, kill, wait_until
from wsi_mmm.api import Event
from wsi_mmm.errors import ClusterError

pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # several generations of workers import torch

POISON = '''
import importlib.abc, importlib.util, os, sys

class Poison(importlib.abc.MetaPathFinder):
    """Once the forward stage is imported, reading one block of one slide ends its process."""

    def find_spec(self, name, path, target=None):
        if name != "wsi_mmm.engine.stages.forward":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            read = module.read_tiles

            def poisoned(ctx):
                if (ctx.unit.slide.id, ctx.unit.block) == ("poisoned", (1, 1)):
                    {deed}
                return read(ctx)

            module.read_tiles = poisoned

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Poison())
'''


@pytest.fixture
def slides(tiny_slide: Path, tmp_path: Path) -> list[Path]:
    """Two copies of the tiny slide: one that will be poisoned, and its neighbour."""
    paths = [tmp_path / "poisoned.tiff", tmp_path / "neighbour.tiff"]
    for path in paths:
        shutil.copy(tiny_slide, path)
    return paths


def poisoned_cluster(folder: Path, deed: str, *options: str) -> PlainCluster:
    """Two workers that do ``deed`` at one block of the slide called poisoned; one death more than one is too many."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(POISON.replace("{deed}", deed))
    few = {
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
    }
    return PlainCluster(folder, options=options, env=few)


def result(folder: Path, name: str) -> bytes:
    return (folder / name / "result.geojson.gz").read_bytes()


def when(kind: str, deed: Callable[[], object]) -> Callable[[Event], None]:
    """A listener that does something once, at the first event of that kind."""
    todo = [deed]

    def listener(event: Event) -> None:
        if event.kind == kind and todo:
            todo.pop()()

    return listener


def test_a_unit_that_kills_every_worker_is_put_aside(slides: list[Path], quiet_bytes: bytes, tmp_path: Path) -> None:
    """The report names its slide and block, its neighbours are done; mended, a re-run does only what is missing."""
    out = tmp_path / "out"
    with poisoned_cluster(tmp_path, "os.kill(os.getpid(), 9)") as cluster:
        report = wsi_mmm.run(slides, output=out, block_tiles=2, scheduler=cluster.address)
    rows = {row.id: row for row in report.slides}
    assert (rows["poisoned"].status, rows["neighbour"].status) == ("failed", "done"), rows["neighbour"].error
    assert "forward of block 1-1: its process was killed" in (rows["poisoned"].error or "")
    assert result(out, "neighbour") == quiet_bytes and report.exit_code == 3
    again = wsi_mmm.run(slides, output=out, block_tiles=2)
    rows = {row.id: row for row in again.slides}
    assert rows["neighbour"].extra["resumed"] and rows["poisoned"].status == "done"
    assert rows["poisoned"].cache_hits > 0 and result(out, "poisoned") == quiet_bytes


def test_a_unit_that_needs_more_memory_than_a_worker_has_is_done_apart(
    slides: list[Path], quiet_bytes: bytes, tmp_path: Path
) -> None:
    """The nanny ends a worker that grows; in a process of its own the same block goes well, and nothing is lost."""
    eat = "eaten = bytearray(b'x') * (3 << 30); import time; time.sleep(3)"
    with poisoned_cluster(tmp_path, eat, "--memory-limit", "2.5GB") as cluster:
        report = wsi_mmm.run(slides, output=tmp_path / "out", block_tiles=2, scheduler=cluster.address)
    assert [row.status for row in report.slides] == ["done", "done"], [row.error for row in report.slides]
    assert result(tmp_path / "out", "poisoned") == result(tmp_path / "out", "neighbour") == quiet_bytes


def test_workers_and_nodes_that_go_are_replaced(slides: list[Path], quiet_bytes: bytes, tmp_path: Path) -> None:
    """A worker killed with -9, then a nanny with its worker: the rest does it all, to the very same bytes."""
    with PlainCluster(tmp_path) as cluster:
        pids = list(cluster.pids().values())

        def storm() -> None:
            os.kill(pids[0], 9)
            kill(cluster.processes[-1].pid)

        listener = when("tile", storm)
        report = wsi_mmm.run(
            slides, output=tmp_path / "out", block_tiles=1, scheduler=cluster.address, progress=listener
        )
    assert [row.status for row in report.slides] == ["done", "done"], [row.error for row in report.slides]
    assert result(tmp_path / "out", "poisoned") == result(tmp_path / "out", "neighbour") == quiet_bytes


def test_a_scheduler_that_restarts_ends_the_run_in_one_line(
    slides: list[Path], quiet_bytes: bytes, tmp_path: Path
) -> None:
    """The command says what to do; done again, it does only what is missing, to the very same bytes."""
    out, script = (
        tmp_path / "out",
        [sys.executable, "-m", "wsi_mmm", "run", *map(str, slides), "-o", str(tmp_path / "out")],
    )
    with PlainCluster(tmp_path) as cluster:
        command = [*script, "--scheduler", cluster.address]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        blocks = "*/.work/*/cache/*/*/receipts/*"
        wait_until(lambda: running.poll() is not None or bool(list(out.glob(blocks))), "the first block", 500)
        assert running.poll() is None, running.communicate()
        kill(cluster.scheduler.pid)
        cluster.start_scheduler()
        _, errors = running.communicate(timeout=300)
        assert running.returncode == 1 and "Traceback" not in errors, errors
        assert "the connection to the scheduler was lost; run again to resume" in errors
        for process in cluster.processes[1:3]:  # whether they come back is their own affair
            kill(process.pid)
        cluster.add_worker()
        report = wsi_mmm.run(slides, output=out, scheduler=cluster.address)
    assert report.exit_code == 0 and sum(row.cache_hits for row in report.slides) > 0
    assert result(out, "poisoned") == result(out, "neighbour") == quiet_bytes


def test_a_job_whose_scheduler_is_gone_is_told_so(slides: list[Path], tmp_path: Path) -> None:
    """Whoever waits for a job on the cluster gets one line, too."""
    with PlainCluster(tmp_path, workers=1) as cluster, cluster.client() as client:
        job = wsi_mmm.submit(client, slides, output=tmp_path / "out", block_tiles=1)
        wait_until(lambda: job.status.tiles_total > 0, "the plan", 500)
        threading.Timer(1, lambda: kill(cluster.scheduler.pid)).start()
        with pytest.raises(ClusterError, match="the connection to the scheduler was lost"):
            job.result(120)


def test_a_slide_that_is_deleted_fails_alone(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """Deleted while others are worked on: it is named, and they are done."""
    paths = [tmp_path / f"s{n}.tiff" for n in range(6)]
    for path in paths:
        shutil.copy(tiny_slide, path)
    report = wsi_mmm.run(paths, output=tmp_path / "out", progress=when("tile", paths[-1].unlink))
    assert [row.status for row in report.slides] == ["done"] * 5 + ["failed"]
    assert "s5.tiff" in (report.slides[-1].error or "") and result(tmp_path / "out", "s4") == quiet_bytes


def test_an_output_that_becomes_read_only_is_told(slides: list[Path], quiet_bytes: bytes, tmp_path: Path) -> None:
    """Every slide fails in words; once its folder can be written again a re-run goes on."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a disk needs root")
    places = [tmp_path / "out" / path.stem for path in slides]

    def protect() -> None:
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=True)

    try:
        report = wsi_mmm.run(slides, output=tmp_path / "out", block_tiles=1, progress=when("tile", protect))
    finally:
        for place in places:
            subprocess.run(["umount", "-l", str(place)], check=False)
    assert [row.status for row in report.slides] == ["failed", "failed"] and report.exit_code == 4
    assert all("read-only" in (row.error or "").lower() for row in report.slides), report.slides
    again = wsi_mmm.run(slides, output=tmp_path / "out", block_tiles=1)
    assert again.exit_code == 0
    assert sum(row.cache_hits for row in again.slides) > 0  # either slide may have been the first with a tile
    assert result(tmp_path / "out", "poisoned") == quiet_bytes


def test_a_bucket_that_is_away_for_a_while_is_waited_for(
    tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers at its address for a quarter of a minute: slides take longer, and none fails."""
    pytest.importorskip("moto.server")
    from helpers.faulty import Faulty
    from helpers.moto import moto_server
    from wsi_mmm.storage import store

    with moto_server() as upstream:
        front = Faulty(upstream=upstream)
        front.__enter__()
        for name, value in {
            "ENDPOINT_URL": front.url,
            "ACCESS_KEY_ID": "k",
            "SECRET_ACCESS_KEY": "s",
            "REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "2")
        boto3 = pytest.importorskip("boto3")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="slides")
        store.write_bytes("s3://slides/in/tiny.tiff", tiny_slide.read_bytes())
        away = []

        def outage() -> None:
            front.__exit__(None, None, None)
            away.append(time.monotonic())

            def back() -> None:
                front.__enter__()
                away.append(time.monotonic())

            threading.Timer(15, back).start()

        report = wsi_mmm.run(
            "s3://slides/in/tiny.tiff", output="s3://slides/out", block_tiles=1, progress=when("tile", outage)
        )
        assert report.slides[0].status == "done", report.slides[0].error
        assert len(away) == 2, "the run was over before the bucket was back"
        assert store.read_bytes("s3://slides/out/tiny/result.geojson.gz") == quiet_bytes
        front.__exit__(None, None, None)
