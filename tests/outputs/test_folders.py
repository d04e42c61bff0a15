"""Folders that appear whole, on a disk and on object stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi_mmm.errors import OutputError
from wsi_mmm.outputs.folders import published_folder
from wsi_mmm.outputs.maps import zarr_store
from wsi_mmm.slides import store


def test_a_folder_on_an_object_store_holds_the_last_run_alone() -> None:
    """A second run takes the place of the first: nothing of it is left, nothing beside it is touched."""
    uri = "memory://folders/out/features.zarr"
    store.write_bytes("memory://folders/out/features.json", b"beside")
    for names in (("a", "deep/b"), ("a", "c")):
        with published_folder(uri) as place:
            for name in names:
                store.write_bytes(store.join(place, name), name.encode())
    assert [found.rpartition("features.zarr/")[2] for found in store.list_uris(uri)] == ["a", "c"]
    assert store.exists("memory://folders/out/features.json")


def test_errors_of_an_object_store_are_ours() -> None:
    """What the storage library raises half-way is an OutputError without its text."""
    with pytest.raises(OutputError, match="memory://folders/x") as caught, published_folder("memory://folders/x"):
        raise ConnectionError("Authorization: secret")
    assert "secret" not in str(caught.value)


def test_zarr_goes_where_it_can(tmp_path: Path) -> None:
    """A folder or s3://; for anything else the error names the choices."""
    assert "LocalStore" in repr(zarr_store(str(tmp_path)))
    with pytest.raises(OutputError, match="local folders and on s3://"):
        zarr_store("gs://bucket/maps.zarr")
