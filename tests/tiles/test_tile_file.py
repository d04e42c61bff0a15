"""Lists of tiles as other tools write them: what they say, what is refused, which file is of which slide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from helpers.tile_lists import clam_file, trident_file
from wsi_mmm.errors import InputError
from wsi_mmm.tiles import tile_file
from wsi_mmm.tiles.tile_file import match_tile_files, read_tile_list

COORDS = [[512, 0], [0, 0], [0, 512], [512, 0]]


def test_what_trident_and_clam_write_is_read(tmp_path: Path) -> None:
    """Coordinates in their sequence; the size at level 0 as TRIDENT reads it, not as its attribute is rounded down."""
    found = read_tile_list(str(trident_file(tmp_path / "a.h5", COORDS, size=224, slide=(9, 8), magnification=40,
                                            target=30, overlap=7)))  # fmt: skip
    assert found.corners.tolist() == COORDS and found.corners.dtype == np.int64
    assert (found.size, found.size_level0, found.overlap, found.width, found.height) == (224, 299, 7, 9, 8)
    assert found.nominal_mpp == pytest.approx(1 / 3)
    found = read_tile_list(str(clam_file(tmp_path / "b.h5", np.int32(COORDS), size=256, level=1, downsample=4.0001,
                                         level_size=(1000, 500))))  # fmt: skip
    assert (found.size, found.size_level0, found.width, found.nominal_mpp) == (256, 1024, 4000.1, None)
    legacy = clam_file(
        tmp_path / "c.h5", COORDS, size=256, level=0, downsample=1, level_size=(9, 9), custom_downsample=2
    )
    assert read_tile_list(str(legacy)).size_level0 == 512


def test_the_digest_covers_coordinates_their_sequence_and_sizes(tmp_path: Path) -> None:
    """And nothing else: the same list written elsewhere is the same."""

    def digest(name: str, coords: Any, **more: Any) -> str:
        return read_tile_list(
            str(trident_file(tmp_path / name, coords, **{"size": 256, "slide": (9, 9), **more}))
        ).digest()

    base = digest("a.h5", COORDS)
    assert digest("other/a.h5", COORDS, savetodir="elsewhere") == base
    others = {digest("b.h5", COORDS[::-1]), digest("c.h5", COORDS, size=128), digest("d.h5", np.add(COORDS, [1, 0]))}
    assert len(others | {base}) == 4


def _file(change: Callable[[h5py.File], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            change(file)

    return write


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 2), "i8")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "coords", (4, 2))
    file.create_virtual_dataset("coords", layout)


def _external(file: h5py.File) -> None:
    file.create_dataset("coords", (1, 2), "i8", external=[("/etc/hostname", 0, 16)])


def _set(name: str, value: Any) -> Callable[[Path], object]:
    def change(file: h5py.File) -> None:
        file.create_dataset("coords", data=COORDS).attrs.update({"patch_size": 256, name: value})

    return _file(change)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b"not HDF5"), "no list of tiles .*wsi-mmm export --to h5"),
        (lambda path: None, "there is no file of tiles at .*TRIDENT or CLAM"),
        (lambda path: path.mkdir(), "it is a folder"),
        (_file(lambda file: file.create_dataset("features", data=np.ones((2, 3)))), "coords is no data set"),
        (_file(lambda file: file.create_group("coords")), "coords is no data set"),
        (_file(lambda file: file.create_dataset("coords", data=np.ones((2, 2)))), "float64.*STAMP writes micrometres"),
        (_file(lambda file: file.create_dataset("coords", data=np.ones((2, 3), int))), r"shape \[2, 3\]"),
        (_file(lambda file: file.create_dataset("coords", data=np.ones((2, 2, 2), int))), r"shape \[2, 2, 2\]"),
        (_file(lambda file: file.create_dataset("coords", (1 << 40, 2), "i8", chunks=(64, 2))), r"claims int64\["),
        (_file(lambda file: file.create_dataset("coords", (4, 2), "i8", chunks=(1 << 27, 2), maxshape=(None, 2))),
         "chunks of"),
        (_file(lambda file: file.create_dataset("coords", data=np.full((1, 2), 1 << 62))), "no px of a slide"),
        (_file(lambda file: file.create_dataset("coords", data=np.full((1, 2), -(1 << 40)))), "no px of a slide"),
        (_file(_virtual), "lies in other files"),
        (_file(_external), "lies in other files"),
        (_file(lambda file: file.update({"coords": h5py.ExternalLink("/etc/other.h5", "/coords")})), "no data set of"),
        (_file(lambda file: file.update({"coords": h5py.SoftLink("/elsewhere")})), "no data set of this file"),
        (_set("patch_size", 255.5), "patch_size is 255.5"),
        (_set("patch_size", 0), "patch_size is 0"),
        (_set("patch_size", 1 << 40), "tiles of 1099511627776 px"),
        (_set("patch_size_level0", -5), "patch_size_level0 is -5"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_tiles_is_one_line(write: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    """Nothing of another file is read, nothing that a file claims is made."""
    write(tmp_path / "a.h5")
    with pytest.raises(InputError, match=words) as caught:
        read_tile_list(str(tmp_path / "a.h5"))
    assert "\n" not in str(caught.value)


def test_attributes_that_contradict_each_other_or_claim_much(tmp_path: Path) -> None:
    """Sizes of which one must be wrong are refused; long, odd or infinite attributes are as if they were not there."""
    path = trident_file(tmp_path / "a.h5", COORDS, size=256, slide=(9, 9), patch_size_level0=512)
    with pytest.raises(InputError, match="512 px of level 0 wide by patch_size_level0, 256 by magnifications"):
        read_tile_list(str(path))
    odd = {"overlap": "NA", "level0_width": np.arange(5000), "level0_height": np.inf}
    found = read_tile_list(str(trident_file(tmp_path / "b.h5", COORDS, size=256, slide=(9, 9), **odd)))
    assert (found.overlap, found.width, found.height, found.size_level0) == (None, None, None, 256)


def test_a_folder_holds_a_file_per_slide(tmp_path: Path) -> None:
    """TRIDENT's and CLAM's names, in the folder or in patches/, and ours beside features; by id before the name."""
    names = ["a_patches.h5", "b.h5", "patches/c_patches.h5", "patches/d.h5", "e/features.h5", "x-f.h5", "f.h5"]
    for name in names:
        trident_file(tmp_path / name, COORDS, size=256, slide=(9, 9))
    where = str(tmp_path)
    found = match_tile_files(where, [*((name, name) for name in "abcde"), ("x-f", "f"), ("missing", "missing")])
    assert [uri and Path(uri).relative_to(tmp_path).as_posix() for uri, _ in found] == [*names[:6], None]
    assert "missing_patches.h5 (TRIDENT) and missing.h5 (CLAM)" in found[-1][1]
    assert "for missing/features.h5 (wsi-mmm export --to h5)" in found[-1][1]
    for uri, error in match_tile_files(where, [("1-f", "f"), ("2-f", "f")]):
        assert uri is None and "f.h5 would be the list of several slides named f: name that of this slide" in error
    assert match_tile_files(f"{where}/b.h5", [("z", "z")]) == [(f"{where}/b.h5", "")]
    [(uri, error), _] = match_tile_files(f"{where}/b.h5", [("z", "z"), ("y", "y")])
    assert uri is None and "tiles of one slide, and 2 are given: name a folder" in error
    assert {error for _, error in match_tile_files(f"{where}/no", [("z", "z"), ("y", "y")])} == {
        f"there is no {where}/no: name the .h5 file that lists the tiles of a slide, or a folder of files"
    }


def test_a_prefix_of_a_bucket_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not asked for each name of each slide."""
    asked: list[str] = []

    def list_uris(prefix: str) -> list[str]:
        asked.append(prefix)
        return [f"s3://b/out/patches/{name}_patches.h5" for name in "ab"]

    monkeypatch.setattr(tile_file.store, "list_uris", list_uris)
    found = match_tile_files("s3://b/out", [(name, name) for name in "abc"])
    assert [uri for uri, _ in found] == ["s3://b/out/patches/a_patches.h5", "s3://b/out/patches/b_patches.h5", None]
    assert asked == ["s3://b/out"]
