"""Trainings on shares of the data: each once, the same held-out parts, a table and a plot of what came of it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.annotation_targets import joint
from wsi_mmm.errors import ConfigError, OptionError
from wsi_mmm.training import fractions
from wsi_mmm.training.config import parse
from wsi_mmm.training.fit import TrainingListener
from wsi_mmm.training.fractions import Curve, FractionResult, train_fractions


def test_each_share_is_trained_once_and_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shares, two seeds: four folders; one that is missing is done again and no other; the table has every figure;
    the plot is there, and without matplotlib a line says what to install."""
    config = parse(joint(tmp_path), ["steps=1", "seed=3"])
    lines: list[str] = []
    curve = train_fractions(
        config, [100, 50], seeds=2, metric="disc.mean_iou", listener=TrainingListener(say=lines.append)
    )
    names = [f"fraction-{p}-seed-{s}" for p in (50, 100) for s in (3, 4)]
    assert all((tmp_path / "run" / name / "model" / "card.json").exists() for name in names)
    assert [line.partition(" ->")[0] for line in lines if "data sets" in line] == [
        "50 % of the items, seed 3", "50 % of the items, seed 4", "100 % of the items, seed 3",
        "100 % of the items, seed 4",
    ]  # fmt: skip
    assert curve.part == "test" and [row.items for row in curve.rows()] == [6, 12] and not curve.notes
    with Image.open(tmp_path / "run" / "fractions.png") as plot:
        assert plot.width > 300
    assert (tmp_path / "run" / "fractions.svg").read_text().startswith("<?xml")
    with (tmp_path / "run" / "fractions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["percent"], row["seed"], row["part"]) for row in rows} == {
        (p, s, part) for p in ("50", "100") for s in ("3", "4") for part in ("val", "test")
    }
    summary = json.loads((tmp_path / "run" / "fractions.json").read_text())
    assert summary["metric"] == "disc.mean_iou" and len(summary["rows"][0]["values"]) == 2

    (tmp_path / "run" / names[1] / "result.json").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines.clear()
    again = train_fractions(
        config, [50, 100], seeds=2, metric="disc.mean_iou", listener=TrainingListener(say=lines.append)
    )
    assert {line.partition(" ->")[0] for line in lines} == {"50 % of the items, seed 4"}
    assert again.rows() == curve.rows()
    assert again.notes == ("no plot: it needs matplotlib, pip install 'wsi-mmm[plot]'",)

    with pytest.raises(ConfigError, match=r"another configuration \(optim differ\): choose another out"):
        train_fractions(parse(joint(tmp_path), ["steps=1", "seed=3", "optim.rate=0.5"]), [50], seeds=1)
    with pytest.raises(OptionError, match=r"the metric is 'disc\.nothing': a task of kind 'segment' gives mean_iou"):
        train_fractions(config, [50], seeds=1, metric="disc.nothing")
    older = json.loads((tmp_path / "run" / names[0] / "result.json").read_text())
    del older["configuration"]["model"]["crop"]  # an option that there was not yet
    (tmp_path / "run" / names[0] / "result.json").write_text(json.dumps(older))
    lines.clear()
    assert (
        train_fractions(config, [50], seeds=1, metric="disc.mean_iou", listener=TrainingListener(say=lines.append))
        .rows()[0]
        .values
        == curve.rows()[0].values[:1]
    )
    assert not lines
    (tmp_path / "run" / names[0] / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged; remove it"):
        train_fractions(config, [50], seeds=1)


def test_shares_that_cannot_be_are_named(tmp_path: Path) -> None:
    """Percents and seeds are checked before anything is trained."""
    config = parse(joint(tmp_path))
    for percents, seeds in (([], 1), ([0.0], 1), ([101], 1), ([10], 0)):
        with pytest.raises(OptionError, match=r"percents above 0|give 1 or more"):
            train_fractions(config, percents, seeds=seeds)


def test_a_share_has_a_folder_and_checkpoints_of_its_own(tmp_path: Path) -> None:
    """Also where checkpoints go elsewhere."""
    config = parse(joint(tmp_path), ["checkpoint.folder=s3://bucket/kept"])
    one = fractions.share_of(config, 0.5, 2)
    assert one.out.endswith("run/fraction-0.5-seed-2") and one.sampling.fraction == 0.005 and one.seed == 2
    assert one.checkpoint.folder == "s3://bucket/kept/fraction-0.5-seed-2"


def test_mean_and_deviation_are_those_of_the_seeds() -> None:
    """Of one seed the deviation is 0; the rows begin with the smallest share."""
    points = [
        FractionResult(percent, seed, 5, {"t": {"f1": value}}, {})
        for percent, seed, value in ((100, 0, 0.9), (10, 0, 0.2), (10, 1, 0.4))
    ]
    first, last = Curve("t.f1", "val", tuple(points)).rows()
    assert (first.percent, first.mean, first.values) == (10, pytest.approx(0.3), (0.2, 0.4))
    assert first.deviation == pytest.approx(0.1414, abs=1e-4) and last.deviation == 0.0
