"""Bytes at a URI: merged ranges, whole objects, and errors in words that never show a secret."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from wsi_mmm.errors import ConfigError, NotFound, OutputError, SlideChanged, StorageError
from wsi_mmm.outputs.exports import zarr_store
from wsi_mmm.storage import aws, remote, store
from wsi_mmm.storage.ranges import MergeRule, fetch_merged, plan_spans


def test_a_pipe_or_device_is_refused_at_once(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "a.tif")
    for path in (str(tmp_path / "a.tif"), "/dev/null"):
        with pytest.raises(NotFound, match="pipe, socket or device"):
            store.open_store(path)


RULES = st.builds(
    MergeRule,
    gap=st.integers(0, 300),
    waste=st.sampled_from([0.0, 0.1, 1.0]),
    part=st.sampled_from([10, 100, 1000]),
    most=st.integers(1, 4),
    longest=st.sampled_from([50, 500, 5000]),
)


@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 200)), max_size=30), RULES)
def test_merged_ranges_bring_the_bytes_of_each_range(ranges: list[tuple[int, int]], rule: MergeRule) -> None:
    """Every range gets its own bytes, clipped to the end; no more is fetched beside them than the rule allows."""
    data = bytes(n * 7 % 256 for n in range(1000))
    calls: list[tuple[int, int]] = []

    def get(spans: Sequence[tuple[int, int]]) -> list[bytes]:
        calls.extend(spans)
        return [data[a : a + n] for a, n in spans]

    found = fetch_merged(ranges, 1000, rule=rule, get=get)
    assert [bytes(part) for part in found] == [data[start : start + length] for start, length in ranges]
    needed = {n for start, length in ranges for n in range(start, min(start + length, 1000))}
    assert sum(length for _, length in calls) <= len(needed) * (1 + rule.waste)


def test_near_ranges_are_one_request_and_far_ones_are_not() -> None:
    """The gap decides, and so does what all gaps add up to: the smallest are joined first."""
    assert len(plan_spans([(0, 100), (110, 100)], 1000, MergeRule(gap=10)).spans) == 1
    assert len(plan_spans([(0, 100), (111, 100)], 1000, MergeRule(gap=10)).spans) == 2
    both = plan_spans([(0, 100), (109, 100), (220, 100), (321, 100)], 1000, MergeRule(gap=50, waste=0.03))
    assert both.spans == [(0, 209), (220, 201)]


def test_long_spans_are_cut_between_ranges_into_parts_that_travel_side_by_side() -> None:
    """Equal parts of at least ``part``; what is shorter than two of them stays whole."""
    ranges = [(n * 10, 10) for n in range(100)]
    assert plan_spans(ranges, 1000, MergeRule(gap=0, part=501)).spans == [(0, 1000)]
    parts = plan_spans(ranges, 1000, MergeRule(gap=0, part=200, most=4)).spans
    assert parts == [(0, 250), (250, 250), (500, 250), (750, 250)]
    assert len(plan_spans(ranges, 1000, MergeRule(gap=0, part=200, most=1, longest=350)).spans) == 3


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
    assert store.list_folders(root) == ["a"] and store.list_folders(store.join(root, "none")) == []
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
    """Reading what is not there is NotFound."""
    with pytest.raises(NotFound):
        store.read_bytes(str(tmp_path / "none"))


def test_an_unknown_scheme_names_those_that_work() -> None:
    """A typing error in the scheme is told."""
    with pytest.raises(NotFound, match="s3://"):
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
    found = aws.s3_settings({"HOME": str(tmp_path), "AWS_PROFILE": "lab"})
    assert found == {
        "region": "eu-north-1",
        "access_key_id": "AK",
        "secret_access_key": "SK%1",
        "endpoint": "http://host:9",
    }
    with pytest.raises(ConfigError, match="aws configure"):
        aws.s3_settings({"HOME": str(tmp_path), "AWS_PROFILE": "other"})
    services = "[profile lab]\nservices = near\n[services near]\ns3 =\n  endpoint_url = http://near:9\nsts =\n  x = y\n"
    (tmp_path / ".aws/config").write_text(services)
    assert aws.s3_settings({"HOME": str(tmp_path), "AWS_PROFILE": "lab"})["endpoint"] == "http://near:9"


def test_what_the_library_panics_at_is_refused_or_mended(tmp_path: Path) -> None:
    """Empty variables are none, line breaks at the ends of keys go, and no error shows a key."""
    keys = {"AWS_ACCESS_KEY_ID": "AK\n", "AWS_SECRET_ACCESS_KEY": " SK\r\n", "AWS_SESSION_TOKEN": ""}
    found = aws.s3_settings({**keys, "AWS_ENDPOINT_URL": "", "AWS_REGION": ""})
    assert found == {"region": "us-east-1", "access_key_id": "AK", "secret_access_key": "SK",
                     "endpoint": "https://s3.us-east-1.amazonaws.com"}  # fmt: skip
    assert aws.s3_settings({**keys, "AWS_ENDPOINT_URL": "HTTP://h:9"})["endpoint"] == "http://h:9"
    for wrong in ({"AWS_ACCESS_KEY_ID": "A\nK"}, {"AWS_SECRET_ACCESS_KEY": "SÄK"}, {"AWS_REGION": "us east"}):
        (name,) = wrong
        with pytest.raises(ConfigError, match=f"{name} holds letters") as caught:
            aws.s3_settings({**keys, **wrong})
        assert "K" not in str(caught.value).replace("KEY", "")
    for bucket in ("a b", "", "..", "ü", "b%20", "a\nb", "[x]"):
        with pytest.raises(StorageError, match="no name of a bucket"):
            store.open_store(f"s3://{bucket}/key")


def test_the_environment_counts_more_than_the_files(tmp_path: Path) -> None:
    """As for the AWS tools."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id = AK\naws_secret_access_key = SK\n")
    (tmp_path / ".aws/config").write_text("[default]\nregion = eu-north-1\nendpoint_url = http://file:9\n")
    found = aws.s3_settings({"HOME": str(tmp_path), "AWS_ENDPOINT_URL": "http://h:9", "AWS_REGION": "eu-west-1"})
    assert (found["endpoint"], found["region"], found["access_key_id"]) == ("http://h:9", "eu-west-1", "AK")


def test_public_buckets_are_read_unsigned() -> None:
    """Either variable of the two tools works."""
    for name in ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE"):
        assert aws.s3_settings({name: "true"})["skip_signature"] == "true"


@pytest.mark.parametrize(
    "key", ["sso_session = work", "credential_process = /bin/keys", "role_arn = arn:aws:iam::1:role/x"]
)
def test_a_profile_whose_keys_lie_elsewhere_says_how_to_export_them(tmp_path: Path, key: str) -> None:
    """Single sign-on, processes and roles are named, not answered with a riddle."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(f"[profile lab]\nregion = eu-north-1\n{key}\n")
    with pytest.raises(ConfigError, match="export-credentials --profile lab"):
        aws.s3_settings({"HOME": str(tmp_path), "AWS_PROFILE": "lab"})


def test_a_broken_credentials_file_is_one_line_without_its_content(tmp_path: Path) -> None:
    """The parser repeats the line it stumbles over; the error does not."""
    (tmp_path / "keys").write_text("aws_secret_access_key = very-secret\n")
    with pytest.raises(ConfigError, match="check its lines") as caught:
        aws.s3_settings({"HOME": str(tmp_path), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys")})
    assert "very-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_out_that_is_none_is_told(value: str) -> None:
    """WSI_MMM_STORAGE_TIMEOUT takes seconds above 0."""
    assert remote.storage_timeout({}) == 30
    assert remote.storage_timeout({"WSI_MMM_STORAGE_TIMEOUT": "2.5"}) == 2.5
    with pytest.raises(ConfigError, match="WSI_MMM_STORAGE_TIMEOUT"):
        remote.storage_timeout({"WSI_MMM_STORAGE_TIMEOUT": value})


@pytest.mark.parametrize(
    ("kind", "far"), [("fuse.juicefs", True), ("nfs4", True), ("ext4", False), ("fuseblk", False), ("tmpfs", False)]
)
def test_a_file_on_a_network_mount_is_far(
    tmp_path: Path, kind: str, far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is then fetched ahead, in long runs, as a slide on S3 is."""
    path = tmp_path / "slide"
    path.write_bytes(b"0123456789")
    device = path.stat().st_dev
    line = f"31 29 {os.major(device)}:{os.minor(device)} / /mnt rw,relatime shared:1 - {kind} server:/share rw\n"
    monkeypatch.setattr("wsi_mmm.storage.local.Path.read_text", lambda _: "29 1 0:999 / / rw - proc proc rw\n" + line)
    opened = store.open_store(str(path))
    assert opened.remote is far
    assert [bytes(part) for part in opened.get_ranges([(0, 2), (8, 5)])] == [b"01", b"89"]
    opened.close()


def test_a_folder_on_an_object_store_holds_the_last_run_alone() -> None:
    """A second run takes the place of the first: nothing of it is left, nothing beside it is touched."""
    uri = "memory://folders/out/features.zarr"
    store.write_bytes("memory://folders/out/features.json", b"beside")
    for names in (("a", "deep/b"), ("a", "c")):
        with store.published_folder(uri) as place:
            for name in names:
                path = Path(place) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(name.encode())
    assert [found.rpartition("features.zarr/")[2] for found in store.list_uris(uri)] == ["a", "c"]
    assert store.exists("memory://folders/out/features.json")


def test_what_says_what_a_folder_is_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a Zarr on an object store is none: its metadata is put when all the rest is there."""
    uri, put = "memory://folders/last.zarr", []
    monkeypatch.setattr(store, "write_bytes", lambda uri, data: put.append(uri.rpartition("last.zarr/")[2]))
    with store.published_folder(uri) as place:
        zarr.create_group(place).create_array("a", shape=(2,), dtype="uint8")[:] = 1
    assert put[-1] == "zarr.json" and sorted(put) == ["a/c/0", "a/zarr.json", "zarr.json"]


def test_a_folder_that_ends_badly_is_not_put() -> None:
    """A full disk is an OutputError that names it; other errors stay what they are; the store keeps what it had."""
    uri = "memory://folders/x"
    store.write_bytes(f"{uri}/old", b"old")
    with pytest.raises(OutputError, match=f"^{tempfile.gettempdir()}: the disk is full"), store.published_folder(uri):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(ZeroDivisionError), store.published_folder(uri):
        raise ZeroDivisionError
    assert [found.rpartition("/")[2] for found in store.list_uris(uri)] == ["old"]


def test_zarr_goes_where_it_can(tmp_path: Path) -> None:
    """A folder or s3://; for anything else the error names the choices."""
    assert "LocalStore" in repr(zarr_store(str(tmp_path)))
    with pytest.raises(OutputError, match="local folders and on s3://"):
        zarr_store("gs://bucket/maps.zarr")
