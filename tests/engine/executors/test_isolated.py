"""A work in a process of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from helpers.plans import plan_of
from wsi_mmm.engine.executors import isolated
from wsi_mmm.engine.plan import forward_units
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.units import Failure, SlideTask, WorkUnit
from wsi_mmm.errors import ClusterError


def test_what_kills_its_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """ClusterError says which block, and how the process ended; this process lives."""
    monkeypatch.setattr(isolated, "_PROGRAM", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    unit = forward_units(plan_of(300, 300, 2, 8, 1.0, 0))[1]
    with pytest.raises(ClusterError, match=r"forward of block 0-1: its process was killed \(out of memory\?\)"):
        isolated.perform(unit)


def test_an_error_comes_back_as_a_receipt(tmp_path: Path) -> None:
    """A slide that is not there fails in the words it fails with elsewhere; no descriptor is left open."""
    task = SlideTask("s", str(tmp_path / "no.svs"), str(tmp_path / "out"), Recipe("m", "h", (), 0.5, 64, 0))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    result = isolated.perform(WorkUnit("plan", task))
    assert isinstance(result, Failure) and "no.svs" in result.error
    assert not before or len(os.listdir("/proc/self/fd")) <= before


def test_an_ending_is_said_in_words() -> None:
    """Signals by name, codes by number."""
    assert isolated.describe_exit(-9) == "its process was killed (out of memory?)"
    assert isolated.describe_exit(-11) == "its process crashed (SIGSEGV)"
    assert isolated.describe_exit(1) == "its process ended with code 1"
