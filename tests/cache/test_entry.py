"""The cache: whole shards, damage that is noticed and mended, writers that do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from wsi_mmm.cache import ArraySpec, CacheEntry
from wsi_mmm.errors import OutputError, StorageError
from wsi_mmm.types import U8

MAPS = ArraySpec("maps/x", (2, 64, 64), "uint8")
FEATURES = ArraySpec("features", (3,), "float32")
CORNER = np.array([[9, 8], [8, 9]])  # in the last, partial block of 10 x 10 tiles


def values(seed: int = 0) -> U8:
    """uint8[2, 2, 64, 64]: what the two tiles of `CORNER` hold."""
    return np.random.default_rng(seed).integers(1, 255, (2, *MAPS.item), dtype=np.uint8)


def shards(folder: Path) -> list[Path]:
    """Every shard below a folder."""
    return sorted(path for path in folder.rglob("c/**/*") if path.is_file())


def damage(path: Path, kind: str) -> None:
    """Hit a file as a bad disk or a crash would."""
    data = path.read_bytes()
    half = len(data) // 2
    broken = {
        "cut": data[:half],
        "flipped": data[:half] + bytes(b ^ 255 for b in data[half : half + 20]) + data[half + 20 :],
        "noise": np.random.default_rng(1).integers(0, 256, len(data), dtype=np.uint8).tobytes(),
    }
    path.write_bytes(broken[kind])


def test_what_is_written_is_read_and_the_rest_is_zero(tmp_path: Path) -> None:
    """Blocks at the edge of the grid are cut; another opener sees the same."""
    CacheEntry(str(tmp_path), 10, 10, 4).write_block(MAPS, CORNER, values())
    found = CacheEntry(str(tmp_path), 10, 10, 4).read(MAPS, slice(8, 10), slice(8, 10))
    np.testing.assert_array_equal(found[[1, 0], [0, 1]], values())
    assert not found[0, 0].any()
    assert len(shards(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["cut", "flipped", "noise"])
@pytest.mark.parametrize("spec", [MAPS, FEATURES], ids=["maps", "features"])
def test_a_damaged_shard_is_an_error_and_can_be_written_again(tmp_path: Path, kind: str, spec: ArraySpec) -> None:
    """Never other values: reading names the fix, and writing the block anew (as --force does) mends it."""
    entry = CacheEntry(str(tmp_path), 10, 10, 4)
    stored = values() if spec is MAPS else np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    entry.write_block(spec, CORNER, stored)
    damage(shards(tmp_path)[0], kind)
    with pytest.raises(StorageError, match=r"damaged.*delete it and run again") as caught:
        entry.read(spec, slice(8, 10), slice(8, 10))
    assert "\n" not in str(caught.value)
    entry.write_block(spec, CORNER, stored)
    np.testing.assert_array_equal(entry.read(spec, slice(8, 10), slice(8, 10))[[1, 0], [0, 1]], stored)


def test_damaged_metadata_says_so(tmp_path: Path) -> None:
    """A zarr.json that was cut names the folder to delete."""
    CacheEntry(str(tmp_path), 10, 10, 4).write_block(MAPS, CORNER, values())
    (tmp_path / "maps/x/zarr.json").write_text('{"zarr_format')
    with pytest.raises(OutputError, match="delete it and run again"):
        CacheEntry(str(tmp_path), 10, 10, 4).read(MAPS, slice(0, 1), slice(0, 1))


def test_receipts_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    """A block with a cut or foreign receipt is done again."""
    entry = CacheEntry(str(tmp_path), 10, 10, 4)
    assert entry.block_record("0-0") is None
    entry.write_block_record("0-0", {"tiles": "ab"})
    assert entry.block_record("0-0") == {"tiles": "ab"}
    for text in (b'{"tiles": "a', b"\xff\xfe", b"[1]", b""):
        (tmp_path / "receipts/0-0.json").write_bytes(text)
        assert entry.block_record("0-0") is None


def test_writers_at_once_leave_what_each_would(tmp_path: Path) -> None:
    """Eight entries that create the array and write its blocks, each twice, end in the values of one writer."""
    blocks = [np.array([[y, x]]) for y in (0, 4, 8) for x in (0, 4, 8)] * 2

    def write(index: np.ndarray) -> None:
        entry = CacheEntry(str(tmp_path), 10, 10, 4)
        entry.write_block(MAPS, index, values(int(index.sum()))[:1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, blocks))
    found = CacheEntry(str(tmp_path), 10, 10, 4).read(MAPS, slice(None), slice(None))
    for index in blocks:
        np.testing.assert_array_equal(found[tuple(index[0])], values(int(index.sum()))[0])


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file where the folder should be is an OutputError with the reason."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write the cache"):
        CacheEntry(str(tmp_path / "file" / "cache"), 10, 10, 4).write_block(MAPS, CORNER, values())
