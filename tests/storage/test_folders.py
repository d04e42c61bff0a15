"""Folders that appear whole, on a disk and on object stores."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import zarr

from wsi_mmm.errors import OutputError
from wsi_mmm.outputs.exports import zarr_store
from wsi_mmm.storage import store
from wsi_mmm.storage.folders import published_folder


def test_a_folder_on_an_object_store_holds_the_last_run_alone() -> None:
    """A second run takes the place of the first: nothing of it is left, nothing beside it is touched."""
    uri = "memory://folders/out/features.zarr"
    store.write_bytes("memory://folders/out/features.json", b"beside")
    for names in (("a", "deep/b"), ("a", "c")):
        with published_folder(uri) as place:
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
    with published_folder(uri) as place:
        zarr.create_group(place).create_array("a", shape=(2,), dtype="uint8")[:] = 1
    assert put[-1] == "zarr.json" and sorted(put) == ["a/c/0", "a/zarr.json", "zarr.json"]


def test_a_folder_that_ends_badly_is_not_put() -> None:
    """A full disk is an OutputError that names it; other errors stay what they are; the store keeps what it had."""
    uri = "memory://folders/x"
    store.write_bytes(f"{uri}/old", b"old")
    with pytest.raises(OutputError, match=f"^{tempfile.gettempdir()}: the disk is full"), published_folder(uri):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(ZeroDivisionError), published_folder(uri):
        raise ZeroDivisionError
    assert [found.rpartition("/")[2] for found in store.list_uris(uri)] == ["old"]


def test_zarr_goes_where_it_can(tmp_path: Path) -> None:
    """A folder or s3://; for anything else the error names the choices."""
    assert "LocalStore" in repr(zarr_store(str(tmp_path)))
    with pytest.raises(OutputError, match="local folders and on s3://"):
        zarr_store("gs://bucket/maps.zarr")
