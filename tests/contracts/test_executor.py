"""What every Executor holds: one suite for the serial one, threads and Dask workers, on units of a real tiny slide."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from wsi_mmm.api import run_request
from wsi_mmm.engine.executors.serial import SerialExecutor
from wsi_mmm.engine.executors.threads import ThreadsExecutor
from wsi_mmm.engine.plan import forward_units, interpret_units
from wsi_mmm.engine.run import RunRequest
from wsi_mmm.engine.units import (
    Capabilities,
    Executor,
    Failure,
    ForwardResult,
    InterpretResult,
    Kind,
    PlanResult,
    PublishResult,
    SlidePlan,
    UnitResult,
    WorkUnit,
    result_status,
)

Make = Callable[[RunRequest], Executor]
KINDS: tuple[Kind, ...] = ("plan", "extract", "forward", "interpret", "publish")


def _dask(request: RunRequest) -> Executor:
    from wsi_mmm.engine.executors.dask_local import local_cluster

    return local_cluster(1)


EXECUTORS: dict[str, Make] = {
    "serial": lambda request: SerialExecutor(),
    "threads": lambda request: ThreadsExecutor(request.recipe),
    "dask": _dask,
}


@pytest.fixture(scope="module", params=[name for name in EXECUTORS if name != "dask"] + [
    pytest.param("dask", marks=pytest.mark.slow)
])  # fmt: skip
def make(request: pytest.FixtureRequest) -> Make:
    """Make an executor of each kind."""
    return EXECUTORS[request.param]


@pytest.fixture
def wanted(tiny_slide: Path, tmp_path: Path) -> RunRequest:
    """A run over a tiny slide in blocks of one tile."""
    return run_request(str(tiny_slide), output=tmp_path, tasks="nuclei", features=False, block_tiles=2, overlay=False)


@pytest.fixture
def executor(make: Make, wanted: RunRequest) -> Iterator[Executor]:
    """An executor, closed at the end."""
    made = make(wanted)
    yield made
    made.close(cancel=True)


def drained(executor: Executor, units: list[WorkUnit], seconds: float = 300.0) -> list[UnitResult]:
    """The results of ``units``, which are started as there is room."""
    waiting, found, until = list(units), list[UnitResult](), time.monotonic() + seconds
    while len(found) < len(units):
        assert time.monotonic() < until, f"{len(found)} of {len(units)} results"
        while waiting and executor.room(waiting[0].kind) > 0:
            executor.start(waiting.pop(0))
        result = executor.wait(0.5)
        if result is not None:
            found.append(result)
    return found


def planned(executor: Executor, wanted: RunRequest) -> SlidePlan:
    """The plan of the slide."""
    [result] = drained(executor, [WorkUnit("plan", wanted.tasks[0])])
    assert isinstance(result, PlanResult) and result.plan is not None
    return result.plan


def test_an_executor_states_what_it_is_like(executor: Executor) -> None:
    """Its capabilities are a record; at first there is room for every kind, and nothing has ended."""
    assert isinstance(executor.capabilities, Capabilities)
    assert all(executor.room(kind) >= 1 for kind in KINDS)
    assert executor.wait(0.0) is None


def test_a_slide_goes_through_every_stage(executor: Executor, wanted: RunRequest) -> None:
    """Each unit gives exactly one result of its own kind, with where it ran and what it took; room is given back."""
    room = {kind: executor.room(kind) for kind in KINDS}
    plan = planned(executor, wanted)
    assert len(plan.index) and plan.slide.id == wanted.tasks[0].id and plan.slide.recipe == wanted.recipe
    forwards, interprets = forward_units(plan), interpret_units(plan)
    assert len(forwards) > 1
    results = drained(executor, forwards)
    assert sorted(result.facts.name for result in results) == sorted(unit.name for unit in forwards)
    assert all(isinstance(result, ForwardResult) and not result.cached for result in results)
    for result in results:
        assert {one.step for one in result.facts.times} == {"read", "model", "write"}
        assert result.facts.pid and result.facts.worker and result.facts.bytes_read and result.facts.peak_rss_mb
    parts = drained(executor, interprets)
    assert all(isinstance(result, InterpretResult) for result in parts)
    [end] = drained(executor, [WorkUnit("publish", plan.slide, grid=plan.grid, entry=plan.entry)])
    assert isinstance(end, PublishResult) and end.summary.tiles == len(plan.index)
    assert end.summary.objects == {"nuclei": sum(part.objects for part in parts if isinstance(part, InterpretResult))}
    assert (Path(plan.slide.output) / "result.geojson.gz").exists()
    assert all(executor.room(kind) >= room[kind] for kind in ("plan", "forward"))
    [again] = drained(executor, [WorkUnit("plan", wanted.tasks[0])])
    assert isinstance(again, PlanResult) and again.published is not None and again.plan is None


def test_a_unit_may_be_repeated(executor: Executor, wanted: RunRequest) -> None:
    """The second time its values are in the cache, and nothing is computed."""
    unit = forward_units(planned(executor, wanted))[0]
    first, second = drained(executor, [unit])[0], drained(executor, [unit])[0]
    assert (result_status(first), result_status(second)) == ("ok", "cached")


def test_a_unit_that_raises_is_a_failure_and_the_others_go_on(executor: Executor, wanted: RunRequest) -> None:
    """The reason in one line that names the slide; the executor is of use afterwards."""
    lost = replace(wanted.tasks[0], id="lost", uri=wanted.tasks[0].uri + ".gone")
    results = drained(executor, [WorkUnit("plan", lost), WorkUnit("plan", wanted.tasks[0])])
    found = {result.facts.slide: result for result in results}
    bad = found["lost"]
    assert isinstance(bad, Failure) and bad.facts.kind == "plan" and "\n" not in bad.error and ".gone" in bad.error
    assert isinstance(found[wanted.tasks[0].id], PlanResult)


def test_closing_twice_or_in_the_middle_does_no_harm(make: Make, wanted: RunRequest) -> None:
    """With units under way and with ``cancel``; no exception leaves."""
    executor = make(wanted)
    executor.start(WorkUnit("plan", wanted.tasks[0]))
    executor.close(cancel=True)
    with suppress(RuntimeError):
        executor.close()
