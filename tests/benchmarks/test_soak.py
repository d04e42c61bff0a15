"""The soak sees what grows, and ten runs in one cluster let nothing grow."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("distributed")

from benchmarks.bench_soak import FIGURES, Soak, made_up, soak


def samples(**series: list[float]) -> Soak:
    """Of one worker; what is not named stays at 100."""
    return Soak({"worker 1": {figure: series.get(figure, [100.0] * 40) for figure in FIGURES}})


def test_a_handle_that_leaks_every_run_is_seen() -> None:
    """Forty runs, forty handles more: a bar is broken, and it says which."""
    leaking = samples(handles=[100.0 + n for n in range(40)])
    assert [reason.split(" from")[0] for reason in leaking.growing(2.0)] == ["worker 1: handles"]


def test_what_grows_until_the_cluster_is_warm_is_no_leak() -> None:
    """Models are loaded in the first runs."""
    assert samples(MB=[10.0, 500.0] + [1000.0] * 38).growing(2.0) == []


@pytest.mark.slow
def test_ten_runs_leave_nothing_behind(tmp_path: Path) -> None:
    """Handles, sockets and threads of every process are as many after the last run as after the warm ones."""
    found = soak(made_up(tmp_path), 10, 1, tmp_path)
    assert found.failed == []
    assert [reason for reason in found.growing(3.0) if ": MB" not in reason] == []
