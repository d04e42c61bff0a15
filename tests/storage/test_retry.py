"""Requests and units of work are tried again when a failure may pass: a few times, or until the storage is back."""

from __future__ import annotations

import pickle
import threading
import time
from dataclasses import replace

import pytest

from helpers.faulty import Faulty
from helpers.moto import moto_bucket
from wsi_mmm.errors import NotFound, OutputError, SlideNotFound, StorageError, TransientCause, TransientError
from wsi_mmm.storage import retry, store
from wsi_mmm.storage.retry import OUTAGE, REQUEST, Outage, RetryPolicy, retry_transient, retry_unit

BUSY = TransientError("busy", TransientCause.OVERLOADED)
HASTY = RetryPolicy(pause=0.01, longest=0.02, jitter=False, seconds=150.0, unproven=20.0)


class Failing:
    """Fails so many times, then gives 7."""

    def __init__(self, times: int, error: StorageError) -> None:
        self.left, self.error, self.calls = times, error, 0

    def __call__(self) -> int:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return 7


class Away:
    """A step that fails until a time."""

    def __init__(self, seconds: float, error: StorageError) -> None:
        self.until, self.error, self.tries = time.monotonic() + seconds, error, 0

    def __call__(self) -> int:
        self.tries += 1
        if time.monotonic() < self.until:
            raise self.error
        return 2


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait."""
    monkeypatch.setattr(retry, "REQUEST", replace(REQUEST, pause=0.0))


# ---------------------------------------------------------------- requests


def test_what_may_pass_is_tried_again() -> None:
    """A few times, and then the last error is told."""
    error = TransientError("cut off", TransientCause.SHORT_ANSWER)
    assert REQUEST.tries is not None
    step = Failing(REQUEST.tries - 1, error)
    assert retry_transient(step) == 7 and step.calls == REQUEST.tries
    step = Failing(REQUEST.tries, error)
    with pytest.raises(TransientError, match="cut off"):
        retry_transient(step)
    assert step.calls == REQUEST.tries


def test_what_will_not_pass_is_told_at_once() -> None:
    """A refusal, and what took so long that it has been tried enough."""
    denied = Failing(1, StorageError("access denied"))
    with pytest.raises(StorageError, match="denied"):
        retry_transient(denied)
    slow = Failing(1, TransientError("no answer", TransientCause.TIMEOUT))
    with pytest.raises(StorageError, match="no answer"):
        retry_transient(slow, replace(REQUEST, seconds=-1.0))
    assert (denied.calls, slow.calls) == (1, 1)


def test_pauses_grow_up_to_the_longest() -> None:
    """Twice as long each time, or a random time up to that; one fewer than there are tries."""
    policy = RetryPolicy(pause=1.0, longest=5.0, jitter=False, tries=6)
    assert list(policy.pauses()) == [1.0, 2.0, 4.0, 5.0, 5.0]
    drawn = list(replace(policy, jitter=True).pauses())
    assert len(drawn) == 5 and all(0 <= a <= b for a, b in zip(drawn, policy.pauses(), strict=True))


@pytest.mark.parametrize("kind", ["truncated", "reset", "503"])
def test_writing_deleting_and_listing_outlive_faults(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in seven requests fails; what is written, listed and deleted is what was asked for."""
    methods = ("GET", "PUT", "HEAD", "DELETE", "POST")
    with (
        moto_bucket("bucket", monkeypatch) as upstream,
        Faulty(upstream=upstream, share=0.0, kinds=(kind,), methods=methods) as front,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.url)
        front.share = 0.15
        uris = [f"s3://bucket/folder/{number}" for number in range(12)]
        for uri in uris:
            store.write_bytes(uri, uri.encode())
        assert sorted(store.list_uris("s3://bucket/folder")) == sorted(uris)
        assert [store.read_bytes(uri) for uri in uris] == [uri.encode() for uri in uris]
        for uri in uris:
            store.delete(uri)
        assert store.list_uris("s3://bucket/folder") == [] and front.faults > 2


# ---------------------------------------------------------------- units of work


@pytest.mark.parametrize("cause", TransientCause)
def test_a_step_is_tried_until_the_storage_is_back(cause: TransientCause) -> None:
    """Reading and writing: what a minute mends is no failure."""
    step, outage = Away(0.2, TransientError("busy", cause)), Outage()
    assert retry_transient(step, HASTY, outage=outage) == 2
    assert step.tries > 3 and outage.since is None and outage.proven


def test_what_time_does_not_mend_is_told_at_once() -> None:
    """A disk that is full, a slide or an object that is not there: one try."""
    for error in (OutputError("no space left"), StorageError("denied"), NotFound("gone")):
        step = Away(5, error)
        with pytest.raises(StorageError):
            retry_transient(step, HASTY, outage=Outage())
        assert step.tries == 1

    def missing(_: int) -> int:
        raise SlideNotFound("gone")

    with pytest.raises(SlideNotFound):
        retry_unit(missing, 1)


def test_what_is_gone_for_good_is_waited_for_once() -> None:
    """The second step of a process whose storage is gone fails with its first try."""
    away, policy = Outage(proven=True), replace(HASTY, seconds=0.2, longest=0.01)
    first, second = Away(60, BUSY), Away(60, BUSY)
    for step in (first, second):
        with pytest.raises(StorageError):
            retry_transient(step, policy, outage=away)
    assert first.tries > 3 and second.tries == 1


def test_the_steps_of_a_process_share_one_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """`retry_unit` gives its value on, waits as `OUTAGE` says, and the next unit is not waited for again."""
    monkeypatch.setattr(retry, "process_outage", Outage(proven=True))
    monkeypatch.setattr(retry, "OUTAGE", replace(HASTY, seconds=0.1, longest=0.01))
    assert retry_unit(lambda value: value + 1, 1) == 2
    first, second = Away(60, BUSY), Away(60, BUSY)
    for step in (first, second):
        with pytest.raises(TransientError):
            retry_unit(lambda _, step=step: step(), 1)
    assert first.tries > 2 and second.tries == 1


def test_an_address_that_never_worked_is_told_sooner() -> None:
    """It may be wrong."""
    assert OUTAGE.unproven < OUTAGE.seconds
    step = Away(60, BUSY)
    with pytest.raises(StorageError):
        retry_transient(step, replace(HASTY, unproven=0.0), outage=Outage())
    assert step.tries == 1


def test_a_run_that_is_stopped_does_not_wait() -> None:
    """The stop is heard between two tries."""
    stopped = threading.Event()
    stopped.set()
    step = Away(60, BUSY)
    with pytest.raises(StorageError):
        retry_transient(step, HASTY, outage=Outage(proven=True), stopped=stopped)
    assert step.tries == 1


def test_the_cause_decides_and_not_the_words() -> None:
    """Words of another cause in the text change nothing, also on the way between processes."""
    error = pickle.loads(pickle.dumps(TransientError("answers end early; cannot be resolved", TransientCause.TIMEOUT)))
    assert retry_transient(Failing(1, error)) == 7
    with pytest.raises(StorageError):
        retry_transient(Failing(1, StorageError("the server is overloaded (503); try again")))
