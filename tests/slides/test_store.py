"""Bytes at a URI: merged ranges, whole objects, and errors in words that never show a secret."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_mmm.errors import OutputError, SlideChanged, SlideNotFound, StorageError
from wsi_mmm.slides import store
from wsi_mmm.slides.ranges import fetch_merged, merge


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 200)), max_size=30), st.integers(0, 300))
def test_merged_ranges_bring_the_bytes_of_each_range(ranges: list[tuple[int, int]], gap: int) -> None:
    """Whatever overlaps or touches is fetched in fewer spans; every range gets its own bytes, clipped to the end."""
    data = bytes(n * 7 % 256 for n in range(1000))
    calls: list[tuple[int, int]] = []

    def get(spans: object) -> list[bytes]:
        calls.extend(spans)  # type: ignore[call-overload]
        return [data[a : a + n] for a, n in spans]  # type: ignore[attr-defined]

    found = fetch_merged(ranges, 1000, gap=gap, get=get)
    assert found == [data[start : start + length] for start, length in ranges]
    assert len(calls) <= len(ranges)


def test_near_ranges_are_one_request_and_far_ones_are_not() -> None:
    """The gap decides."""
    assert len(merge([(0, 10), (15, 10)], 5)[0]) == 1
    assert len(merge([(0, 10), (16, 10)], 5)[0]) == 2
    assert len(merge([(0, 8 << 20), (8 << 20, 10)], 5)[0]) == 2


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_local_object_is_written_read_listed_and_deleted(tmp_path: Path, form: str) -> None:
    """Paths and file:// URIs do the same."""
    root = form.format(tmp_path)
    uri = store.join(root, "a", "b.bin")
    assert not store.exists(uri)
    store.write_bytes(uri, b"hello")
    store.write_bytes(store.join(root, "c.bin"), b"x")
    assert store.exists(uri)
    assert store.read_bytes(uri) == b"hello"
    assert store.list_uris(root) == [uri, store.join(root, "c.bin")]
    store.write_bytes(uri, b"other")
    assert store.read_bytes(uri) == b"other"
    store.delete(uri)
    store.delete(uri)
    assert store.list_uris(root) == [store.join(root, "c.bin")]
    assert not list(tmp_path.rglob(".*"))


def test_ranges_of_a_file_stop_at_its_end(tmp_path: Path) -> None:
    """A range beyond the end is short or empty, never an error."""
    (tmp_path / "f").write_bytes(b"0123456789")
    opened = store.open_store(str(tmp_path / "f"))
    assert opened.size == 10
    assert opened.get_ranges([(8, 5), (20, 3), (0, 2), (4, 0)]) == [b"89", b"", b"01", b""]
    opened.close()


def test_a_file_changed_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    """Two versions are never mixed."""
    (tmp_path / "f").write_bytes(b"0" * 100)
    opened = store.open_store(str(tmp_path / "f"))
    opened.get_ranges([(0, 10)])
    with (tmp_path / "f").open("ab") as file:
        file.write(b"more")
    with pytest.raises(SlideChanged, match="run again"):
        opened.get_ranges([(0, 10)])
    opened.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only"), (errno.EIO, "error")],
)
def test_failing_writes_are_said_in_words_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    """Disk full, permission and a read-only file system each have a sentence; no temporary file stays."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=words):
        store.write_bytes(str(tmp_path / "f"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_writing_below_a_file_names_the_mistake(tmp_path: Path) -> None:
    """A folder that is a file is an OutputError."""
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(OutputError):
        store.write_bytes(str(tmp_path / "f" / "g"), b"x")


def test_missing_files_are_not_found(tmp_path: Path) -> None:
    """Reading what is not there is SlideNotFound."""
    with pytest.raises(SlideNotFound):
        store.read_bytes(str(tmp_path / "none"))


def test_an_unknown_scheme_names_those_that_work() -> None:
    """A typing error in the scheme is told."""
    with pytest.raises(SlideNotFound, match="s3://"):
        store.open_store("s4://bucket/key")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:pass@host/a.svs?X-Amz-Signature=abc#f", "https://host/a.svs"),
        ("s3://key:secret@bucket/a#b?.svs", "s3://bucket/a#b?.svs"),
        ("/data/a b.svs", "/data/a b.svs"),
        ("C:\\data\\a.svs", "C:\\data\\a.svs"),
    ],
)
def test_redacted_uris_hold_no_credentials_and_no_query(uri: str, shown: str) -> None:
    """What is shown is safe to show."""
    assert store.redact(uri) == shown


def test_a_profile_gives_the_keys_of_the_shared_files(tmp_path: Path) -> None:
    """AWS_PROFILE is looked up in credentials and config, as the AWS tools do."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[lab]\naws_access_key_id = AK\naws_secret_access_key = SK%1\n")
    (tmp_path / ".aws/config").write_text("[profile lab]\nregion = eu-north-1\nendpoint_url = http://host:9\n")
    found = store._s3_settings({"HOME": str(tmp_path), "AWS_PROFILE": "lab"})
    assert found == {
        "region": "eu-north-1",
        "access_key_id": "AK",
        "secret_access_key": "SK%1",
        "endpoint": "http://host:9",
    }
    with pytest.raises(StorageError, match="aws configure"):
        store._s3_settings({"HOME": str(tmp_path), "AWS_PROFILE": "other"})


def test_public_buckets_are_read_unsigned() -> None:
    """Either variable of the two tools works."""
    for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE"):
        assert store._s3_settings({name: "true"})["skip_signature"] == "true"
