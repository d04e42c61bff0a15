"""Requests that may be repeated are, a few times, when what went wrong may pass."""

from __future__ import annotations

import pytest

from helpers.faulty import Faulty
from helpers.moto import moto_bucket
from wsi_mmm.errors import StorageError, TransientCause, TransientError
from wsi_mmm.storage import retry, store
from wsi_mmm.storage.retry import TRIES, insisted


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


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait."""
    monkeypatch.setattr(retry, "PAUSE", 0.0)


def test_what_may_pass_is_tried_again() -> None:
    """A few times, and then the last error is told."""
    work = Failing(TRIES - 1, TransientError("cut off", TransientCause.SHORT_ANSWER))
    assert insisted(work) == 7 and work.calls == TRIES
    work = Failing(TRIES, TransientError("cut off", TransientCause.SHORT_ANSWER))
    with pytest.raises(StorageError, match="cut off"):
        insisted(work)
    assert work.calls == TRIES


def test_what_will_not_pass_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal, and what took so long that it has been tried enough."""
    work = Failing(1, StorageError("access denied"))
    with pytest.raises(StorageError, match="denied"):
        insisted(work)
    monkeypatch.setattr(retry, "SOON", -1.0)
    slow = Failing(1, TransientError("no answer", TransientCause.TIMEOUT))
    with pytest.raises(StorageError, match="no answer"):
        insisted(slow)
    assert (work.calls, slow.calls) == (1, 1)


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
