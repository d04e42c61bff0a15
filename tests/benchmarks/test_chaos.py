"""The benchmark of chaos judges rightly, and a small one of it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_tally import HELD, doings, tally


def lines(*words: str) -> list[dict[str, Any]]:
    """Of "time pid what name"."""
    found = []
    for word in words:
        moment, pid, what, name = word.split()
        found.append({"t": float(moment), "pid": int(pid), "what": what, "name": name})
    return found


def test_a_unit_whose_worker_was_killed_is_explained() -> None:
    """It had begun there, and is done again elsewhere."""
    log = lines("1 7 begin s/forward/0-0", "5 8 begin s/forward/0-0", "6 8 ok s/forward/0-0")
    found = tally(doings(log), {7: 3.0}, [])
    assert (found.done, found.redone, found.explained) == (1, 1, 1)
    assert found.holds


def test_a_unit_that_is_done_again_for_no_reason_breaks_the_bar() -> None:
    """Its worker lives; a worker killed long after it had ended explains nothing either."""
    log = lines("1 7 begin s/plan/0-0", "2 7 ok s/plan/0-0", "40 8 begin s/plan/0-0", "41 8 ok s/plan/0-0")
    for killed in ({}, {7: 2.0 + HELD + 1}):
        found = tally(doings(log), killed, [])
        assert found.odd == ["s/plan/0-0"]
        assert not found.holds


def test_a_request_that_failed_is_no_reason_to_do_a_unit_again() -> None:
    """It is counted by its reason, and breaks the bar."""
    log = lines("1 7 begin s/publish/0-0", "2 7 raised s/publish/0-0", "3 7 begin s/publish/0-0")
    found = tally(doings([*log, *lines("4 7 ok s/publish/0-0")]), {}, [])
    assert found.again == {"fault": 1} and found.odd == [] and not found.holds


def test_what_was_in_the_cache_is_looked_up_and_not_redone() -> None:
    """A forward that has ended is "cached" when it comes again; computed again it would be for no reason."""
    log = lines("1 7 begin s/forward/0-0", "2 7 ok s/forward/0-0", "5 8 begin s/forward/0-0")
    assert tally(doings([*log, *lines("6 8 cached s/forward/0-0")]), {7: 3.0}, [4.0]).redone == 0
    assert not tally(doings([*log, *lines("6 8 ok s/forward/0-0")]), {7: 3.0}, [4.0]).holds


def test_a_restart_explains_the_plans_of_slides_under_way() -> None:
    """The books were lost with it, so that they are made anew."""
    log = lines("1 7 begin s/plan/0-0", "2 7 ok s/plan/0-0", "40 8 begin s/plan/0-0", "41 8 ok s/plan/0-0")
    assert tally(doings(log), {}, [20.0]).again == {"restart": 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_storm_loses_nothing_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slides, two kills, one S3 request in twenty failing: the files are those of the quiet run."""
    for module in ("distributed", "moto.server", "boto3"):
        pytest.importorskip(module)
    from benchmarks.bench_chaos import Plan, chaos

    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
        monkeypatch.setenv(f"AWS_{name}", "")  # so that what the benchmark sets is taken back
        monkeypatch.delenv(f"AWS_{name}")
    plan = Plan(workers=2, every=6.0, kills=2, restart=False, block_tiles=1, size=(900, 700))
    outcome = chaos([], 3, plan, tmp_path)
    assert outcome.wrong == [] and outcome.runs == [0]
    assert outcome.units.odd == [] and outcome.units.again["fault"] <= 1
    assert outcome.kills == 2 and outcome.faults > 0 and outcome.files >= 3 * 4
