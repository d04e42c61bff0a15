"""The published result does not depend on how the work was cut, where it ran, or how often it was interrupted."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from shapely.geometry import shape

import wsi_mmm
from wsi_mmm.api import RunReport, run_request
from wsi_mmm.engine.events import Event, silent
from wsi_mmm.engine.executors.serial import SerialExecutor
from wsi_mmm.engine.run import run_slides


def published(slide: Path, output: Path, **options: Any) -> bytes:
    """Run, and return the GeoJSON's bytes."""
    report = wsi_mmm.run(slide, output=output, **options)
    [row] = report.slides
    assert row.status == "done", row.error
    return (output / row.id / "result.geojson.gz").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"block_tiles": 1},
        {"block_tiles": 3},
        {"reader": "tiff"},
        {"batch_size": 1},
        {"batch_size": 5, "block_tiles": 2},
        {"threads": 1},
        {"threads": 3},
    ],
    ids=str,
)
def test_the_cut_of_the_work_changes_no_byte(
    options: dict[str, Any], tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path
) -> None:
    """Block size, batch size and number of threads leave the GeoJSON byte-identical."""
    assert published(tiny_slide, tmp_path, **options) == quiet_bytes


def test_objects_are_measured_unless_one_says_not(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """Only the publishing step depends on it: values come from the cache, outlines and ids are the same. What is said
    of an object is true of its outline, whole, on whatever border of blocks it lies."""
    cache = tmp_path / "cache"
    published(tiny_slide, tmp_path, cache=cache, measure="none", block_tiles=1)
    plain = gzip.decompress((tmp_path / "tiny" / "result.geojson.gz").read_bytes())
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, cache=cache, block_tiles=1).slides
    assert not row.extra["resumed"] and row.cache_hits == row.tiles
    assert (tmp_path / "tiny" / "result.geojson.gz").read_bytes() == quiet_bytes
    measured = json.loads(gzip.decompress(quiet_bytes))["features"]
    nuclei = [one for one in measured if one["properties"]["objectType"] == "detection"]
    assert len(nuclei) > 50
    for one in nuclei:
        outline, numbers = shape(one["geometry"]), one["properties"]["measurements"]
        assert numbers.pop("Area µm^2") == pytest.approx(outline.area * 0.25, rel=1e-4)
        assert numbers.pop("Length µm") == pytest.approx(outline.length * 0.5, rel=1e-4)
        assert 0 < numbers.pop("Circularity") <= 1 and 0 <= numbers.pop("Eccentricity") < 1
        assert numbers.pop("Minor axis µm") <= numbers.pop("Major axis µm") < outline.length
        assert set(numbers) == {"probability"}
    assert json.loads(plain)["features"] == measured  # all that is left


def test_a_cold_and_a_warm_cache_give_the_same_bytes(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """What comes from the cache is what would have been computed; the second run computes nothing."""
    cache = tmp_path / "cache"
    assert published(tiny_slide, tmp_path / "cold", cache=cache, cache_tiles=True) == quiet_bytes
    report = wsi_mmm.run(tiny_slide, output=tmp_path / "warm", cache=cache, cache_tiles=True)
    [row] = report.slides
    assert (tmp_path / "warm" / row.id / "result.geojson.gz").read_bytes() == quiet_bytes
    assert row.cache_hits == row.tiles and row.busy_share == 0


def test_the_serial_executor_gives_the_same_bytes(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """One thread, one unit at a time: the specification that threads and workers are held to."""
    request = run_request(str(tiny_slide), output=tmp_path, block_tiles=2)
    [row] = run_slides(request, SerialExecutor(), silent).slides
    assert row.status == "done", row.error
    assert (tmp_path / row.id / "result.geojson.gz").read_bytes() == quiet_bytes


def test_a_second_run_finds_the_slide_done(tiny_slide: Path, tmp_path: Path) -> None:
    """Re-running resumes: nothing is computed, nothing is written; --force redoes it to the same bytes."""
    first = published(tiny_slide, tmp_path)
    [was] = json.loads((tmp_path / "report.json").read_text())["slides"]
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path).slides
    assert row.status == "done" and row.extra["resumed"]
    cost = {name: was[name] for name in ("seconds", "bytes_read", "peak_rss_mb", "busy_share")}
    assert {name: getattr(row, name) for name in cost} == cost and row.extra["time"] == was["time"]
    assert row.extra["this_run"]["seconds"] < was["seconds"]
    path = tmp_path / row.id / "result.geojson.gz"
    before = path.stat().st_mtime_ns
    assert published(tiny_slide, tmp_path, force=True) == first
    assert path.stat().st_mtime_ns > before


def test_another_recipe_is_not_taken_for_done(tiny_slide: Path, tmp_path: Path) -> None:
    """A finished slide is redone when the recipe asks for something else."""
    published(tiny_slide, tmp_path)
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, tissue="none").slides
    assert not row.extra["resumed"]


def test_cancelled_and_resumed(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """Ctrl-C in the middle loses nothing that was done: the next run takes it up and ends the same."""

    class Interrupted(KeyboardInterrupt):
        pass

    def interrupt(event: Event) -> None:
        if event.kind == "tile" and event.done >= 4:
            raise Interrupted

    with pytest.raises(KeyboardInterrupt):
        wsi_mmm.run(tiny_slide, output=tmp_path, block_tiles=1, progress=interrupt)
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, block_tiles=1).slides
    assert row.cache_hits >= 1
    assert (tmp_path / row.id / "result.geojson.gz").read_bytes() == quiet_bytes


@pytest.fixture(scope="session")
def openslide_bytes(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The GeoJSON of a quiet run through OpenSlide, with no cache and nothing done before."""
    return published(tiny_slide, tmp_path_factory.mktemp("openslide"), reader="openslide")


def test_another_reader_is_not_taken_for_done(tiny_slide: Path, openslide_bytes: bytes, tmp_path: Path) -> None:
    """A forced reader redoes a finished slide and is recorded; forcing the one that content chooses does not."""
    published(tiny_slide, tmp_path)
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, reader="tiff").slides
    assert row.extra["resumed"]
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, reader="openslide").slides
    assert row.status == "done" and not row.extra["resumed"]
    assert json.loads((tmp_path / row.id / "slide.json").read_text())["reader"] == "openslide"
    assert (tmp_path / row.id / "result.geojson.gz").read_bytes() == openslide_bytes


def test_readers_share_no_cache(tiny_slide: Path, openslide_bytes: bytes, tmp_path: Path) -> None:
    """What one reader left in a cache, values or tiles, answers no other."""
    shared: dict[str, Any] = {"cache": tmp_path / "cache", "cache_tiles": True}
    published(tiny_slide, tmp_path / "tiff", **shared)
    report = wsi_mmm.run(tiny_slide, output=tmp_path / "openslide", reader="openslide", **shared)
    [row] = report.slides
    assert row.cache_hits == 0 and row.tiles > 0
    assert (tmp_path / "openslide" / row.id / "result.geojson.gz").read_bytes() == openslide_bytes
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").glob("*/pixels/*")} == {"tiff", "openslide"}


def test_a_slide_begun_with_one_reader_is_not_ended_with_another(
    tiny_slide: Path, openslide_bytes: bytes, tmp_path: Path
) -> None:
    """Stopped in the middle and resumed with another reader: nothing of the first is kept."""

    def interrupt(event: Event) -> None:
        if event.kind == "tile" and event.done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wsi_mmm.run(tiny_slide, output=tmp_path, block_tiles=1, progress=interrupt)
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, block_tiles=1, reader="openslide").slides
    assert row.cache_hits == 0
    assert (tmp_path / row.id / "result.geojson.gz").read_bytes() == openslide_bytes


def test_slide_json_holds_nothing_of_time_or_place(
    tiny_slide: Path, quiet_run: tuple[Path, RunReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user, cache and reader named outright: the same bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    options: dict[str, Any] = {"cache": tmp_path / "cache", "reader": "tiff", "batch_size": 3, "threads": 1}
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path, **options).slides
    text = (tmp_path / row.id / "slide.json").read_text()
    assert text == (quiet_run[0] / "slide.json").read_text()
    assert json.loads(text)["reader"] == "tiff" and not {"reader", "user_cache", "cache"} & set(
        json.loads(text)["recipe"]
    )


def start(slide: Path, output: Path, *words: str) -> subprocess.Popen[bytes]:
    """The command line in a process group of its own."""
    command = [sys.executable, "-m", "wsi_mmm", "run", str(slide), "-o", str(output), *words]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(folder: Path, pattern: str, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many files are there, or the process has ended."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and len(list(folder.glob(pattern))) < count:
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_of_the_run_and_again(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """The whole run killed in the middle, run again: the same bytes, and what was done is not done again."""
    settings = tmp_path / "small.toml"
    settings.write_text("block_tiles = 1\n")
    process = start(tiny_slide, tmp_path / "out", "--config", str(settings))
    wait_for(tmp_path / "out", "*/.work/*/cache/*/*/receipts/*.json", 3, process)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "out").glob("*/result.geojson.gz"))
    [row] = wsi_mmm.run(tiny_slide, output=tmp_path / "out", block_tiles=1).slides
    assert row.status == "done" and row.cache_hits >= 3
    assert (tmp_path / "out" / row.id / "result.geojson.gz").read_bytes() == quiet_bytes


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_bytes(
    workers: int, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path
) -> None:
    """One and two Dask workers give what one process gives."""
    assert published(tiny_slide, tmp_path, workers=workers, block_tiles=2) == quiet_bytes


@pytest.mark.slow
def test_kill_9_of_a_worker(tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """A worker killed in the middle is replaced, its work is done again, the bytes are the same."""
    killed = []

    def kill(event: Event) -> None:
        if event.kind == "tile" and not killed:
            for child in psutil.Process().children(recursive=True):
                if any("spawn_main" in word for word in child.cmdline()):
                    killed.append(child.pid)
                    child.kill()
                    return

    assert published(tiny_slide, tmp_path, workers=2, block_tiles=1, progress=kill) == quiet_bytes
    assert killed
