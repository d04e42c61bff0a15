"""Several models that see the same tiles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from wsi_mmm.engine.stages import forward
from wsi_mmm.errors import ModelNotLoaded

PIXELS = np.zeros((2, 4, 4, 3), np.uint8)


class FakeContext:
    """A unit whose model notes what it is asked for, and raises ``fault`` when it is to finish."""

    def __init__(self, name: str, calls: list[str], fault: Exception | None = None) -> None:
        self.recipe = SimpleNamespace(tasks=(), model=name)
        self.unit, self.runner = SimpleNamespace(name="0-0"), self
        self.name, self.calls, self.fault = name, calls, fault

    def begin(self, _: Any, __: Any) -> str:
        self.calls.append(f"begin {self.name}")
        return self.name

    def finish(self, pending: str, count: int) -> str:
        self.calls.append(f"finish {self.name}")
        if self.fault is not None:
            raise self.fault
        return f"{pending} {count}"


def run_models(*contexts: FakeContext) -> list[str]:
    """The values of all models, of which the first is the unit's own."""
    targets = cast("Any", list(contexts))
    return [str(output) for _, output in forward._run_models(targets[0], targets, PIXELS)]


def test_models_of_a_pass_have_the_tiles_of_a_block_at_once() -> None:
    """So each has tiles of several blocks waiting, and batches are full: no model waits for another's answers."""
    calls: list[str] = []
    assert run_models(FakeContext("a", calls), FakeContext("b", calls)) == ["a 2", "b 2"]
    assert calls == ["begin a", "begin b", "finish a", "finish b"]


def test_a_companion_that_raises_is_left_out_and_the_own_model_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """A companion's own run says why; what a retry may mend is raised, whoever raises it."""
    broken = ValueError("broken")
    assert run_models(FakeContext("a", []), FakeContext("b", [], broken), FakeContext("c", [])) == ["a 2", "c 2"]
    assert "b: block 0-0 is left to a run of its own: broken" in caplog.text
    with pytest.raises(ValueError, match="broken"):
        run_models(FakeContext("a", [], broken), FakeContext("b", []))
    with pytest.raises(ModelNotLoaded):
        run_models(FakeContext("a", []), FakeContext("b", [], ModelNotLoaded("gone")))
