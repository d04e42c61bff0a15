"""A run from its request to its report, on an executor that only pretends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from helpers.plans import plan_of, result_of
from wsi_mmm.engine.events import Event, Listener, SlideStatus
from wsi_mmm.engine.run import RunRequest, file_sizes, largest_first, run_slides
from wsi_mmm.engine.units import Capabilities, Kind, SlidePlan, UnitResult, WorkUnit, failure_of
from wsi_mmm.errors import Cancelled, ModelNotLoaded, StorageError


@dataclass
class Pretend:
    """An executor that has run every unit as soon as it is started; units of ``bad`` raise."""

    plan: SlidePlan
    capabilities: Capabilities = field(default_factory=Capabilities)
    bad: str = ""
    done: list[UnitResult] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def room(self, kind: Kind) -> int:
        return 3 - len(self.done)

    def start(self, unit: WorkUnit) -> None:
        self.log.append(unit.name)
        failed = failure_of(unit, StorageError("storm")) if unit.slide.id == self.bad else None
        self.done.append(failed or result_of(unit, plan=replace(self.plan, slide=unit.slide)))

    def wait(self, timeout: float) -> UnitResult | None:
        return self.done.pop() if self.done else None

    def close(self, *, cancel: bool = False) -> None:
        self.log.append(f"closed, cancel={cancel}")


def request(output: Path, *names: str) -> tuple[RunRequest, SlidePlan]:
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    tasks = tuple(replace(plan.slide, id=name, output=f"{output}/{name}") for name in names)
    return RunRequest(tasks, plan.slide.recipe, str(output)), plan


def test_a_run_greets_runs_every_slide_and_reports(tmp_path: Path) -> None:
    """Warnings and the dashboard first; an event with a status for each slide; a row each; the executor is closed."""
    wanted, plan = request(tmp_path, "a", "b")
    able = Capabilities(dashboard="http://x/status", warnings=("worker a cannot be used: no torch",))
    executor, heard = Pretend(plan, able, bad="b"), list[Event]()
    report = run_slides(wanted, executor, heard.append)
    assert [(event.kind, event.message) for event in heard[:2]] == [
        ("warning", "worker a cannot be used: no torch"),
        ("stage", "dashboard: http://x/status"),
    ]
    assert {row.id: row.status for row in report.slides} == {"a": "done", "b": "failed"}
    ends = {event.slide: event.status for event in heard if event.kind == "slide"}
    assert ends == {"a": SlideStatus.DONE, "b": SlideStatus.FAILED}
    assert executor.log[-1] == "closed, cancel=False" and (tmp_path / "report.json").exists()


def test_a_run_is_announced_to_jobs_that_share_the_workers(tmp_path: Path) -> None:
    """The announcement hears the events, may stop the run, and ends before the executor is closed."""
    wanted, plan = request(tmp_path, "a")
    log: list[str] = []

    @contextmanager
    def announce(output: str, slides: int, stop: threading.Event) -> Iterator[Listener]:
        log.append(f"{output == str(tmp_path)} {slides}")

        def stop_at_tiles(event: Event) -> None:
            if event.kind == "tile":
                stop.set()

        yield stop_at_tiles

    executor = Pretend(plan, Capabilities(announce=announce))
    with pytest.raises(Cancelled):
        run_slides(wanted, executor, lambda event: None)
    assert log == ["True 1"] and executor.log[-1] == "closed, cancel=True"


def test_many_workers_get_the_largest_slide_first(tmp_path: Path) -> None:
    """By the size of the file; one that is not there comes last. In one process the order stays as given."""
    wanted, plan = request(tmp_path, "small", "gone", "big", "middle")
    tasks = [replace(task, uri=str(tmp_path / f"{task.id}.svs")) for task in wanted.tasks]
    for name, size in (("small", 10), ("big", 1000), ("middle", 100)):
        (tmp_path / f"{name}.svs").write_bytes(b"x" * size)
    assert [task.id for task in largest_first(tasks)] == ["big", "middle", "small", "gone"]
    for many, first in ((True, "big"), (False, "small")):
        executor = Pretend(plan, Capabilities(many_workers=many))
        run_slides(replace(wanted, tasks=tuple(tasks)), executor, lambda event: None)
        assert executor.log[0] == f"{first}/plan/0-0"


def test_slides_in_a_bucket_are_weighed_by_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few lie in one place; a single one is not worth a request."""
    asked = []

    def listed(place: str) -> dict[str, int]:
        asked.append(place)
        return {f"{place}/{n}.svs": n for n in range(9)}

    monkeypatch.setattr("wsi_mmm.storage.store.list_sizes", listed)
    many = [f"s3://b/study/{n}.svs" for n in range(5)]
    assert file_sizes([*many, "s3://b/else/1.svs"])[many[4]] == 4
    assert asked == ["s3://b/study"]


@dataclass
class NoModel(Pretend):
    """An executor whose model cannot be loaded; ``after``: forwards that some worker did before."""

    after: int = 0
    forwards: int = 0

    def start(self, unit: WorkUnit) -> None:
        super().start(unit)
        self.forwards += unit.kind == "forward"
        if unit.kind == "forward" and self.forwards > self.after:
            self.done[-1] = failure_of(unit, ModelNotLoaded("the device 'cuda' cannot be used here"))

    def wait(self, timeout: float) -> UnitResult | None:
        return self.done.pop(0) if self.done else None


def test_a_model_that_cannot_be_loaded_ends_the_run_once(tmp_path: Path) -> None:
    """Not slide by slide; the report of an earlier run stands."""
    wanted, plan = request(tmp_path, "a", "b", "c")
    (tmp_path / "report.json").write_text("earlier")
    executor, heard = NoModel(plan), list[Event]()
    with pytest.raises(ModelNotLoaded, match="the device 'cuda' cannot be used here"):
        run_slides(wanted, executor, heard.append)
    assert executor.log[-1] == "closed, cancel=True" and not [event for event in heard if event.kind == "slide"]
    assert (tmp_path / "report.json").read_text() == "earlier"


def test_one_worker_without_the_model_fails_its_units_alone(tmp_path: Path) -> None:
    """Once tiles have gone through the model elsewhere the others go on."""
    wanted, plan = request(tmp_path, "a")
    report = run_slides(wanted, NoModel(plan, after=1), lambda event: None)
    assert [row.status for row in report.slides] == ["failed"]


def test_what_is_off_scale_is_said_once_and_reported(tmp_path: Path) -> None:
    """The model's resolution before the first slide, a coarse slide at the first one; each slide in the report."""
    wanted, plan = request(tmp_path, "a", "b")
    recipe = replace(wanted.recipe, model_mpp=wanted.recipe.mpp / 2)
    wanted = replace(wanted, recipe=recipe, tasks=tuple(replace(task, recipe=recipe) for task in wanted.tasks))
    coarse = replace(plan, slide=wanted.tasks[0], grid=replace(plan.grid, scale_x=0.6, scale_y=0.6))
    heard = list[Event]()
    report = run_slides(wanted, Pretend(coarse), heard.append)
    said = [event.message for event in heard if event.kind == "warning"]
    assert len(said) == 2 and heard[0].message == said[0] == recipe.warnings()[0]
    assert said[1].startswith("b was scanned at 0.5 mpp, coarser than the 0.5 mpp asked for")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["warnings"] == report.warnings == said
    assert [slide["warning"].split()[0] for slide in found["slides"]] == ["a", "b"]
    assert "2 times smaller" in (tmp_path / "report.html").read_text()
