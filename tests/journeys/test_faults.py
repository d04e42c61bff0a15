"""Bad input and broken surroundings: one clear line, a non-zero exit, and the other slides go on."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from distributed import Client
from PIL import Image

import wsi_mmm
from wsi_mmm.engine.executors import dask
from wsi_mmm.errors import ClusterError, ModelError, OptionError, OutputError


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "wsi_mmm", *map(str, words)],
        capture_output=True, text=True, timeout=200, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def missing(folder: Path, good: Path) -> Path:
    return folder / "nowhere.svs"


def not_a_slide(folder: Path, good: Path) -> Path:
    path = folder / "notes.svs"
    path.write_text("this is no slide")
    return path


def empty_file(folder: Path, good: Path) -> Path:
    path = folder / "empty.svs"
    path.touch()
    return path


def photo(folder: Path, good: Path) -> Path:
    path = folder / "photo.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    return path


def cut_short(folder: Path, good: Path) -> Path:
    """Only the first tenth of the file: the tag tables, or most tiles, are gone."""
    path = folder / "short.tiff"
    path.write_bytes(good.read_bytes()[: good.stat().st_size // 10])
    return path


BROKEN: list[Callable[[Path, Path], Path]] = [missing, not_a_slide, empty_file, photo, cut_short]


@pytest.fixture(scope="module")
def mixed(tiny_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, wsi_mmm.RunReport]:
    """One run over every kind of broken slide with a good one at each end."""
    folder = tmp_path_factory.mktemp("mixed")
    second = folder / "second.tiff"
    shutil.copy(tiny_slide, second)
    slides = [tiny_slide, *(make(folder, tiny_slide) for make in BROKEN), second]
    return folder, wsi_mmm.run(slides, output=folder / "out", tasks=["stain"])


def test_broken_slides_do_not_stop_the_good_ones(mixed: tuple[Path, wsi_mmm.RunReport]) -> None:
    """First and last slide are done although all between them fail; the exit code says 'some failed'."""
    rows = mixed[1].slides
    assert [row.status for row in rows][:: len(rows) - 1] == ["done", "done"]
    assert mixed[1].exit_code == 3


def test_each_broken_slide_says_what_is_wrong_in_one_line(mixed: tuple[Path, wsi_mmm.RunReport]) -> None:
    """The report gives every failed slide one line without a traceback or a foreign exception's name."""
    for row in mixed[1].slides[1:-1]:
        assert row.status in ("failed", "partial"), row
        if row.status == "failed":
            assert row.error and "\n" not in row.error and "Error:" not in row.error and len(row.error) > 20


def test_all_failed_has_its_own_exit_code(tmp_path: Path) -> None:
    """When nothing succeeded the command ends with 4 and the line stands on stderr, without a traceback."""
    done = command("run", tmp_path / "nowhere.svs", "-o", tmp_path / "out")
    assert done.returncode == 4
    assert "nowhere.svs" in done.stderr and "Traceback" not in done.stderr


def test_a_corrupt_tile_is_listed_and_the_slide_finishes(tiny_slide: Path, tmp_path: Path) -> None:
    """One native tile of noise: the slide is published, marked partial, the tile's place is in the report, exit 3."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "corrupt.tiff"
    shutil.copy(tiny_slide, path)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        across = -(-page.imagewidth // page.tilewidth)
        number = 2 * across + 2
        start, count = page.dataoffsets[number], page.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(start + 2)
        file.write(np.random.default_rng(0).bytes(count - 2))
    report = wsi_mmm.run(path, output=tmp_path / "out", tissue="none")
    [row] = report.slides
    assert row.status == "partial" and row.failed_tiles >= 1 and report.exit_code == 3
    x0, y0, x1, y1 = row.extra["failures"][0]
    corner = 2 * page.tilewidth, 2 * page.tilelength
    assert x0 <= corner[0] < x1 and y0 <= corner[1] < y1
    assert (tmp_path / "out" / row.id / "result.geojson.gz").exists()


def test_a_slide_without_mpp_names_the_fix(tmp_path: Path) -> None:
    """No guess is made: the error names the flag, and with it the slide runs."""
    from wsi_mmm.slides.fake import synthetic_slide

    path = tmp_path / "plain.tiff"
    synthetic_slide(path, seed=1, width=700, height=600, nuclei=20, variant="no-mpp")
    [row] = wsi_mmm.run(path, output=tmp_path / "out").slides
    assert row.status == "failed" and row.error and "--mpp-override" in row.error
    [row] = wsi_mmm.run(path, output=tmp_path / "out", mpp_override=0.5).slides
    assert row.status == "done"


@pytest.mark.parametrize("mpp", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_mpp_is_refused_before_anything_runs(mpp: float, tiny_slide: Path, tmp_path: Path) -> None:
    """mpp 0, negative, NaN or infinite raises OptionError."""
    with pytest.raises(OptionError, match="mpp"):
        wsi_mmm.run(tiny_slide, output=tmp_path, mpp=mpp)
    with pytest.raises(OptionError, match="mpp"):
        wsi_mmm.run(tiny_slide, output=tmp_path, mpp_override=mpp)


def test_empty_glass_is_a_valid_empty_result(tmp_path: Path) -> None:
    """A slide of white glass ends well, with a GeoJSON that holds no object."""
    tifffile = pytest.importorskip("tifffile")
    glass = np.full((1024, 1024, 3), 244, np.uint8)
    glass += np.random.default_rng(0).integers(0, 3, glass.shape, np.uint8)
    path = tmp_path / "glass.tiff"
    tifffile.imwrite(
        path, glass, tile=(256, 256), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    report = wsi_mmm.run(path, output=tmp_path / "out", gzip=False)
    [row] = report.slides
    assert row.status == "empty" and report.exit_code == 0
    assert json.loads((tmp_path / "out" / row.id / "result.geojson").read_text())["features"] == []


def test_an_output_that_cannot_be_written_is_said_at_once(tiny_slide: Path, tmp_path: Path) -> None:
    """A file stands where the folder should be: OutputError before any slide is opened."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        wsi_mmm.run(tiny_slide, output=tmp_path / "taken" / "out")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_fails_in_words(tiny_slide: Path, tmp_path: Path) -> None:
    """On a disk that fills up the slide fails with 'no space', and nothing half-written is published."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=False, capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        done = command("run", tiny_slide, "-o", disk / "out")
        assert done.returncode != 0
        assert "space" in done.stderr.lower() and "Traceback" not in done.stderr
        assert not list(disk.glob("out/*/result.geojson.gz")) and not list(disk.glob("out/*/slide.json"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_unknown_task_names_the_known_ones(tiny_slide: Path, tmp_path: Path) -> None:
    """OptionError lists the model's tasks."""
    with pytest.raises(OptionError, match=r"'nucleus'.*nuclei"):
        wsi_mmm.run(tiny_slide, output=tmp_path, tasks=["nucleus"])


@pytest.mark.parametrize("damage", ["garbage", "short", "missing", "pickle"])
def test_a_broken_model_file_is_one_line(damage: str, tiny_slide: Path, tmp_path: Path) -> None:
    """Weights that are garbage, cut short, not there or a pickle: ModelError before any slide is begun."""
    from wsi_mmm.model.card import model_path

    model = tmp_path / "model"
    shutil.copytree(model_path("default"), model)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    broken = {"garbage": b"garbage" * 1000, "short": content[: len(content) // 2], "pickle": pickle.dumps({"a": 1})}
    if damage != "missing":
        weights.write_bytes(broken[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        wsi_mmm.run(tiny_slide, str(model), output=tmp_path / "out")
    assert ("pickle" in str(caught.value)) == (damage == "pickle")


def test_a_model_that_is_not_there_is_said_before_anything_runs(tiny_slide: Path, tmp_path: Path) -> None:
    """ModelError names the models there are."""
    with pytest.raises(ModelError, match="default"):
        wsi_mmm.run(tiny_slide, "no-such-model", output=tmp_path)


def test_a_bad_manifest_row_does_not_stop_the_others(tiny_slide: Path, tmp_path: Path) -> None:
    """A row with a wrong mpp fails alone and is named; the row before and after are done."""
    manifest, second = tmp_path / "list.csv", tmp_path / "second.tiff"
    shutil.copy(tiny_slide, second)
    manifest.write_text(f"slide,mpp\n{tiny_slide},0.5\n{tiny_slide},abc\n{second},0.5\n")
    report = wsi_mmm.run(manifest, output=tmp_path / "out", tasks=["stain"])
    assert [row.status for row in report.slides] == ["done", "failed", "done"]
    assert "row 3" in (report.slides[1].error or "") and "abc" in (report.slides[1].error or "")
    assert report.exit_code == 3


def test_a_scheduler_that_does_not_answer(tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ClusterError names the address, within the time-out."""
    monkeypatch.setattr(dask.connect, "__defaults__", (2.0,))  # seconds
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9"):
        wsi_mmm.run(tiny_slide, output=tmp_path, scheduler="tcp://127.0.0.1:9")
    assert 1.5 < time.monotonic() - started < 30


@pytest.mark.slow
def test_a_worker_without_torch_is_named(tiny_slide: Path, tmp_path: Path) -> None:
    """A cluster whose workers have no torch: one line that says so, and nothing is started."""
    blocker = tmp_path / "no_torch"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError('No module named torch', name='torch')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    tools = Path(sys.executable).parent
    address = "tcp://127.0.0.1:18786"
    scheduler = subprocess.Popen(
        [tools / "dask", "scheduler", "--host", "127.0.0.1", "--port", "18786", "--no-dashboard"],
        stderr=subprocess.DEVNULL,
    )
    worker = subprocess.Popen(
        [tools / "dask", "worker", address, "--no-dashboard", "--local-directory", tmp_path, "--no-nanny"],
        env={**os.environ, "PYTHONPATH": str(blocker)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
        done = command("run", tiny_slide, "-o", tmp_path / "out", "--scheduler", address)
        assert done.returncode not in (0, 3)
        assert "torch" in done.stderr and "Traceback" not in done.stderr
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(20)


def test_ctrl_c_ends_in_words_and_is_resumable(tiny_slide: Path, tmp_path: Path) -> None:
    """SIGINT: exit 130, one line that says how to go on, no traceback; the same command then succeeds."""
    words = [sys.executable, "-m", "wsi_mmm", "run", str(tiny_slide), "-o", str(tmp_path / "out")]
    # A suite that a shell runs in the background ignores SIGINT, and its children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 60
    while time.monotonic() < until and not list((tmp_path / "out").glob("*/.work/*/plan.npz")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr and "resume" in stderr.lower()
    assert command("run", tiny_slide, "-o", tmp_path / "out").returncode == 0
