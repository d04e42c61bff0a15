"""The experiment of docs/transfer.md: its data, its configurations, its tables, and the whole of it in small."""

from __future__ import annotations

import csv
import io
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_mmm import api
from wsi_mmm.training.config import parse

SCRIPT = Path(__file__).parents[1] / "pipelines" / "transfer" / "run.py"
SMALL = ("steps=1", "threads=0", "model.encoder.args={channels=[8,8,8,8]}", "data.0.batch=2")


def png(values: np.ndarray[Any, Any]) -> bytes:
    """A picture file."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_slide: Path) -> Path:
    """A zip of ten pictures with two objects each, and one synthetic slide under the names of all."""
    folder = tmp_path_factory.mktemp("transfer")
    (folder / "nuclei").mkdir()
    (folder / "slides").mkdir()
    with zipfile.ZipFile(folder / "nuclei" / "dsb2018_stained_nuclei.zip", "w") as archive:
        for number in range(10):
            labels = np.zeros((70, 66), np.uint16)
            labels[8:20, 8:20], labels[30:40, 20:35] = 1, 2
            image = np.where(labels[..., None] > 0, (90, 60, 150), (225, 190, 215)).astype(np.uint8)
            archive.writestr(f"images/{number}.png", png(image))
            archive.writestr(f"labels/{number}.png", png(labels))
    with (SCRIPT.parent / "slides.csv").open() as file:
        for row in csv.DictReader(file):
            (folder / "slides" / row["file"]).symlink_to(tiny_slide)
    return folder


@pytest.fixture(scope="module")
def plan(script: dict[str, Any], study: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With the data made."""
    plan = script["Plan"](study, tmp_path_factory.mktemp("out"), (50.0, 100.0), 1, SMALL)
    script["prepare"](plan, 1)
    return plan


def test_targets_are_divided_once_and_for_all(script: dict[str, Any], plan: Any) -> None:
    """Every fifth image is held out, whatever the seed; tiles of each slide are judged below all that were learnt."""
    for seed in (0, 5):
        data = api.prepare_training(script["recipe"](plan, "nuclei"), [*SMALL, f"seed={seed}"]).data[0]
        held = [data.feed.source.index.keys[n] for n in data.split.test.tolist()]
        assert held == ["test/0.bmp", "test/5.bmp"] and len(data.feed.items) == 8 and not len(data.split.val)
    data = api.prepare_training(script["recipe"](plan, "slide"), SMALL).data[0]
    keys = data.feed.source.index.keys
    assert not len(data.split.val) and len(set(data.feed.source.index.labels.tolist())) == 6
    depth = {
        part: [int(Path(keys[n]).stem.split("_")[1]) for n in numbers.tolist()]
        for part, numbers in (("train", data.feed.items), ("test", data.split.test))
    }
    assert depth["test"] and max(depth["train"]) <= min(depth["test"])


def test_what_is_learnt_first_is_nothing_of_the_target(script: dict[str, Any], plan: Any) -> None:
    """Beginnings have the encoder, decoder and rates of the targets, and no task that has data of the target."""
    source = parse(script["recipe"](plan, "source"))
    for target in script["TARGETS"]:
        config = parse(script["recipe"](plan, target.name))
        assert config.model.encoder == source.model.encoder and config.model.decoder == source.model.decoder
        assert (config.model.mean, config.model.std) == (source.model.mean, source.model.std)
        assert config.optim == source.optim and config.sampling.fraction == 1.0
        assert not target.ways["scratch"] and len(target.ways["joint"]) > 1
        assert all(set(tasks) <= {task.name for task in source.task} for tasks in target.ways.values())
    ways = {target.name: {task for tasks in target.ways.values() for task in tasks} for target in script["TARGETS"]}
    assert "nuclei" not in ways["nuclei"] and "stain" not in ways["slide"]


@pytest.mark.slow
def test_the_whole_in_small(
    plan: Any, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both modes, both shares, two beginnings: tables and a plot; the second time nothing is trained again."""
    words = ["--data", str(study), "--out", str(plan.out), "--seeds", "1", "--percents", "50,100", "--only", "nuclei"]
    settings = [word for one in SMALL for word in ("--set", one)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, "--ways", "scratch,joint", *settings])

    def go() -> str:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        told = capsys.readouterr()
        assert ended.value.code == 0, told.err
        return told.out

    first = go()
    assert first.count("fine-tuned 50 %") == first.count("frozen 100 %") == 2
    with (plan.out / "transfer.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["way"], r["mode"], r["percent"], r["items"]) for r in rows} == {
        (way, mode, percent, items)
        for way in ("scratch", "joint")
        for mode in ("fine-tuned", "frozen")
        for percent, items in (("50.0", "4"), ("100.0", "8"))
    }
    text = (plan.out / "transfer.md").read_text()
    assert "| joint | frozen |" in text and "50 % (4) | 100 % (8)" in text and "(0 of 1)" in text
    with Image.open(plan.out / "transfer.png") as plot:
        assert plot.width > 600

    kept = plan.out / "nuclei" / "joint-frozen" / "fraction-50-seed-0" / "result.json"
    before, weights = kept.stat().st_mtime_ns, api.load_model(plan.out / "nuclei/joint-frozen/fraction-50-seed-0/model")
    assert go() == first and kept.stat().st_mtime_ns == before
    start = api.load_model(plan.out / "source/cells-stain-seed-0/model").state_dict()
    held = weights.state_dict()
    assert all(bool((held[key] == start[key]).all()) for key in start if key.startswith("encoder."))


def test_tables_compare_the_same_seeds(script: dict[str, Any]) -> None:
    """Means, deviations, and differences of pairs; a share that was not run is a dash, such a way is left out."""
    target, row = script["TARGETS"][0], script["Row"]
    rows = [
        row("nuclei", way, "frozen", 10.0, seed, 7, value)
        for way, some in (("scratch", (0.2, 0.4)), ("joint", (0.5, 0.3)))
        for seed, value in enumerate(some)
    ]
    rows.append(row("nuclei", "joint", "frozen", 50.0, 0, 34, 0.9))
    lines = list(script["tables"](target, rows))
    assert "| scratch | frozen | 0.300 ± 0.141 | - |" in lines
    assert "| joint | frozen | 0.400 ± 0.141 | 0.900 |" in lines
    assert lines.count("| scratch | frozen | +0.100 (1 of 2) | - |") == 1
    assert not any("cells" in line for line in lines)
    drawn = script["curves"](target, "frozen", rows)
    assert drawn == {"scratch": {10.0: [0.2, 0.4]}, "joint": {10.0: [0.5, 0.3], 50.0: [0.9]}}
