"""A run from its request to its report, on an executor that only pretends."""

from __future__ import annotations

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
from wsi_mmm.errors import Cancelled, StorageError


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
