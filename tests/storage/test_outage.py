"""Storage that is away for a while is waited for; storage that is gone is told."""

from __future__ import annotations

import threading
import time

import pytest

from wsi_mmm.errors import NotFound, OutputError, SlideNotFound, StorageError, TransientCause, TransientError
from wsi_mmm.storage import outage
from wsi_mmm.storage.outage import Outage, patiently


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST", 0.01)
    monkeypatch.setattr(outage, "LONGEST", 0.02)


class Away:
    """A step that fails until a time."""

    def __init__(self, seconds: float, error: StorageError) -> None:
        self.until, self.error, self.tries = time.monotonic() + seconds, error, 0

    def __call__(self, value: int) -> int:
        self.tries += 1
        if time.monotonic() < self.until:
            raise self.error
        return value + 1


@pytest.mark.parametrize("cause", TransientCause)
def test_a_step_is_tried_until_the_storage_is_back(cause: TransientCause) -> None:
    """Reading and writing: what a minute mends is no failure."""
    step, outage = Away(0.2, TransientError("busy", cause)), Outage()
    assert patiently(step, 1, outage=outage) == 2
    assert step.tries > 3 and outage.since is None


def test_what_time_does_not_mend_is_told_at_once() -> None:
    """A disk that is full, a slide that is not there: one try."""
    for error in (OutputError("no space left"), StorageError("denied"), NotFound("gone")):
        step = Away(5, error)
        with pytest.raises(StorageError):
            patiently(step, 1, outage=Outage())
        assert step.tries == 1

    def missing(_: int) -> int:
        raise SlideNotFound("gone")

    with pytest.raises(SlideNotFound):
        patiently(missing, 1, outage=Outage())


def test_what_is_gone_for_good_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step of a process whose storage is gone fails with its first try."""
    monkeypatch.setattr(outage, "PATIENCE", 0.2)
    monkeypatch.setattr(outage, "LONGEST", 0.01)
    away = Outage(proven=True)
    first, second = (Away(60, TransientError("busy", TransientCause.OVERLOADED)) for _ in range(2))
    with pytest.raises(StorageError):
        patiently(first, 1, outage=away)
    with pytest.raises(StorageError):
        patiently(second, 1, outage=away)
    assert first.tries > 3 and second.tries == 1


def test_an_address_that_never_worked_is_told_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be wrong."""
    monkeypatch.setattr(outage, "UNPROVEN", 0.0)
    step = Away(60, TransientError("busy", TransientCause.OVERLOADED))
    with pytest.raises(StorageError):
        patiently(step, 1, outage=Outage())
    assert step.tries == 1


def test_a_run_that_is_stopped_does_not_wait() -> None:
    """The stop is heard between two tries."""
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StorageError):
        patiently(
            Away(60, TransientError("busy", TransientCause.OVERLOADED)), 1, stopped=stopped, outage=Outage(proven=True)
        )
