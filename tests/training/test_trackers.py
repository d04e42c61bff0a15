"""Where figures go: lines and event files that can be read, other services through stand-ins, and no pictures there."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.annotation_targets import SIZE, joint
from wsi_mmm.errors import MissingPackage, OutputError, WsiError
from wsi_mmm.training import trackers
from wsi_mmm.training.config import TrackingPart, parse
from wsi_mmm.training.job import train
from wsi_mmm.training.trackers import Lines, TensorBoard, open_trackers


class Pretend:
    """Stands in for wandb and for mlflow: keeps whatever it is given."""

    class Error(Exception):
        """The base of the package's errors."""

    def __init__(self, broken: bool = False) -> None:
        self.given: list[tuple[str, Any]] = []
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **more: Any) -> Pretend:
            if self.broken:
                raise Pretend.Error("no account")
            self.given.append((name, (args, more)))
            return self

        return call


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> tuple[Pretend, Pretend]:
    """Stand-ins for wandb and mlflow."""
    return stand_in(monkeypatch, Pretend()), stand_in(monkeypatch, Pretend(), "mlflow")


def stand_in(monkeypatch: pytest.MonkeyPatch, pretend: Pretend, name: str = "wandb") -> Pretend:
    module = types.ModuleType(name)
    module.__dict__.update(
        Error=Pretend.Error, init=pretend.init, set_experiment=pretend.set_experiment, start_run=pretend.start_run,
        log_params=pretend.log_params, log_metrics=pretend.log_metrics, end_run=pretend.end_run,
    )  # fmt: skip
    errors = types.ModuleType(f"{name}.exceptions")
    errors.__dict__.update(MlflowException=Pretend.Error)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, f"{name}.exceptions", errors)
    return pretend


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard would show."""
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_lines_are_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """One object per call, in the order of the calls; a file that cannot be written is named."""
    lines = Lines(tmp_path / "m.jsonl")
    lines.figures(1, {"loss/a": 0.5, "b": math.nan})
    lines.figures(2, {"b": -math.inf})
    found = [json.loads(line) for line in lines.path.read_text().splitlines()]
    assert found == [{"step": 1, "loss/a": 0.5, "b": None}, {"step": 2, "b": None}]
    with pytest.raises(OutputError, match=r"cannot write .*m\.jsonl/x"):
        Lines(lines.path / "x").figures(1, {})


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """Figures at their steps; pictures as one row, px for px."""
    board = TensorBoard(tmp_path / "board")
    board.figures(3, {"loss/a": 0.5})
    board.figures(7, {"loss/a": 0.25})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    board.pictures(3, "data", pixels)
    board.close()
    found = events(tmp_path / "board")
    assert [(e.step, e.value) for e in found.Scalars("loss/a")] == [(3, 0.5), (7, 0.25)]
    (image,) = found.Images("data")
    assert (image.height, image.width) == (4, 10)


def test_a_training_writes_lines_and_event_files(tmp_path: Path) -> None:
    """Without being asked: figures of steps and validations in both, and no picture in either."""
    train(parse({**joint(tmp_path), "tracking": {}}, ["steps=2"]))
    found = events(tmp_path / "run" / "tensorboard")
    assert {"loss/tissue", "loss/disc", "rate", "val/tissue/accuracy"} <= set(found.Tags()["scalars"])
    assert found.Tags()["images"] == []
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 2}


def test_pictures_are_shown_on_this_machine_when_asked_for(tmp_path: Path, services: tuple[Pretend, Pretend]) -> None:
    """tracking.images: the first step's augmented crops of each data set, to TensorBoard; W&B and MLflow get numbers
    and the configuration only."""
    tracking = {"images": True, "wandb": "lab", "mlflow": "lab"}
    train(parse({**joint(tmp_path), "tracking": tracking}, ["steps=2"]))
    found = events(tmp_path / "run" / "tensorboard")
    assert set(found.Tags()["images"]) == {"patches", "discs"}
    (image,) = found.Images("patches")
    assert (image.height, image.width, image.step) == (SIZE, 4 * SIZE, 0)
    wandb, mlflow = services
    assert [name for name, _ in wandb.given] == ["init", "log", "log", "finish"]
    assert [name for name, _ in mlflow.given] == [
        "set_experiment", "start_run", "log_params", "log_metrics", "log_metrics", "end_run",
    ]  # fmt: skip
    assert wandb.given[0][1][1]["config"]["steps"] == 2
    for name, (args, _) in (*wandb.given, *mlflow.given):
        if name in ("log", "log_metrics"):
            assert all(isinstance(value, float) for value in args[0].values())


def test_services_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed, and a service that refuses, are one line each before anything is learnt."""
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingPackage, match=rf"pip install 'wsi-mmm\[{name}\]'"):
            open_trackers(TrackingPart(tensorboard=False, **{name: "lab"}), str(tmp_path), {})
    stand_in(monkeypatch, Pretend(broken=True))
    with pytest.raises(WsiError, match=r"tracking with wandb failed \(no account\)"):
        open_trackers(TrackingPart(tensorboard=False, wandb="lab"), str(tmp_path), {})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file where the folder should be is one line."""
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match=r"cannot make .*run"):
        open_trackers(TrackingPart(), str(tmp_path / "run" / "x"), {})
    assert trackers.open_trackers(TrackingPart(tensorboard=False), "s3://bucket/run", {}) == []
