"""Short units travel together, long ones alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from wsi_mmm.engine.executors.bundles import MAX_BATCH_UNITS, TARGET_BATCH_SECONDS, UnitPace, make_bundles
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.stages import perform
from wsi_mmm.engine.units import Failure, InterpretResult, SlideTask, UnitFacts, UnitResult, WorkUnit
from wsi_mmm.timing import StepTime

TASK = SlideTask("s", "s", "/out/s", Recipe("m", "h", ("t",), 0.5, 512, 64))


def result(seconds: float) -> UnitResult:
    times = (StepTime("interpret", 1, 10.0, 10.0 + seconds, {"interpret": seconds}),)
    return InterpretResult(UnitFacts("interpret", "s", times=times))


def test_units_go_alone_until_it_is_known_how_long_they_take() -> None:
    """Of a kind that was never seen, one at a time."""
    pace = UnitPace()
    pace.learn(result(0.01))
    assert pace.size("forward") == 1
    assert pace.size("interpret") > 1


def test_a_bundle_takes_no_longer_than_a_while() -> None:
    """As many as fit; long units go alone, and of very short ones there is an end, too."""
    for seconds, size in (
        (TARGET_BATCH_SECONDS / 4, 4),
        (10 * TARGET_BATCH_SECONDS, 1),
        (TARGET_BATCH_SECONDS / 1000, MAX_BATCH_UNITS),
    ):
        pace = UnitPace()
        pace.learn(result(seconds))
        assert pace.size("interpret") == size


def test_what_becomes_slow_travels_alone_again() -> None:
    """The newest receipts count most."""
    pace = UnitPace()
    pace.learn(result(TARGET_BATCH_SECONDS / 10))
    for _ in range(100):
        pace.learn(result(2 * TARGET_BATCH_SECONDS))
    assert pace.size("interpret") == 1


def test_bundles_hold_every_work_once_and_in_order() -> None:
    """The last one may be smaller."""
    units = [WorkUnit("interpret", TASK, (0, column)) for column in range(7)]
    found = make_bundles(units, 3)
    assert [len(bundle) for bundle in found] == [3, 3, 1]
    assert [unit for bundle in found for unit in bundle] == units


class Units:
    """Take no time; ``bad`` raises what is no error of ours. ``seen``: which were begun, in order."""

    def __init__(self, bad: int) -> None:
        self.bad, self.seen = bad, list[int]()

    def perform(self, unit: WorkUnit, fetches: object = None) -> UnitResult:
        self.seen.append(unit.block[1])
        if unit.block[1] == self.bad:
            raise ValueError("not one of ours")
        times = (StepTime("interpret", 1, 0.0, TARGET_BATCH_SECONDS / 10),)
        return InterpretResult(UnitFacts(unit.kind, unit.slide.id, unit.block, times=times))


@pytest.fixture
def client() -> Iterator[object]:
    """Of a cluster in this process: one worker, one thread."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="inproc://"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as held,
    ):
        yield held


def test_a_unit_that_raises_takes_none_of_its_bundle_with_it(client: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours are done, it alone has failed, and every work has one receipt; places are free again."""
    from wsi_mmm.engine.executors.dask import DaskExecutor

    units = Units(bad=17)
    monkeypatch.setattr(perform, "perform", units.perform)
    executor = DaskExecutor(client)
    waiting = [WorkUnit("interpret", TASK, (0, column)) for column in range(30)]
    found: list[UnitResult] = []
    stop = time.monotonic() + 60
    while len(found) < 30 and time.monotonic() < stop:
        while waiting and executor.room("interpret") > 0:
            executor.start(waiting.pop(0))
        if result := executor.wait(1.0):
            found.append(result)
    assert sorted(result.facts.block[1] for result in found) == list(range(30))
    assert [result.facts.block[1] for result in found if isinstance(result, Failure)] == [17]
    assert units.seen.count(16) > 1 or units.seen.count(18) > 1, "nothing travelled beside it"
    assert executor.wait(0) is None and executor.room("plan") == executor.room("publish") > 0


def test_a_client_keeps_few_of_the_messages_it_sent(client: object) -> None:
    """Dask keeps a thousand, and each may hold hundreds of works: in a long run that would look like a leak."""
    from wsi_mmm.engine.executors.dask import LOG_LENGTH, client_of

    address: str = client.scheduler_info()["address"]  # type: ignore[attr-defined]
    with client_of(address) as held:
        assert held.scheduler_comm.recent_message_log.maxlen == LOG_LENGTH
