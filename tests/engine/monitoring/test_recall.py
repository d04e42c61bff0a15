"""A report read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.plans import plan_of
from wsi_mmm.engine.monitoring import run_report
from wsi_mmm.engine.monitoring.recall import recall
from wsi_mmm.engine.scheduler import SlideState
from wsi_mmm.engine.units import UnitResult
from wsi_mmm.errors import StorageError


def test_a_report_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    """Rows, their extras, the order and the exit code."""
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    report = run_report.begin(str(tmp_path), plan.slide.recipe, [plan.slide])
    report.ledger.watch(UnitResult("plan", plan.slide.id, (0, 0), "ok"))
    report.add(SlideState(plan.slide, status="done", plan=plan, tiles=25, started=1.0, ended=3.0))
    report.save()
    back = recall(str(tmp_path), plan.slide.recipe, [plan.slide])
    assert back.slides[0].tiles == 25 and back.exit_code == report.exit_code == 0
    assert back.slides[0].extra.keys() == report.slides[0].extra.keys()


def test_what_is_no_report_is_said(tmp_path: Path) -> None:
    """StorageError, one line."""
    plan = plan_of(300, 300, 2, 8, 1.0, 0)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(StorageError, match="no report of a run"):
        recall(str(tmp_path), plan.slide.recipe, [plan.slide])
