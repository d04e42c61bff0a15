"""Files that list the tiles of a slide: HDF5 as TRIDENT, CLAM and ``wsi-mmm export --to h5`` write it.

``coords`` int[n, 2] are level-0 (x, y) of top-left corners; attributes say how wide a tile is. TRIDENT
(``trident/IO.py``, ``coords_to_h5``): patch_size, patch_size_level0, level0_magnification, target_magnification,
overlap, level0_width, level0_height. CLAM (``wsi_core/WholeSlideImage.py``, ``process_contour``): patch_size px of
level patch_level, whose px are ``downsample`` px of level 0 wide; level_dim is its size. Ours: TRIDENT's, and mpp.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import h5py
import numpy as np

from wsi_mmm.errors import InputError, NotFound, StorageError
from wsi_mmm.storage import store
from wsi_mmm.types import I64

MOST_TILES = 5_000_000
"""Tiles that a file may list: a gigapixel slide has some 10,000."""

MOST_BYTES = 4 << 30
_FARTHEST = 1 << 30  # level-0 px from the corner of the slide
_WIDEST = 1 << 20  # px of a tile


@dataclass(frozen=True, slots=True, kw_only=True)
class TileList:
    """The tiles that a file lists. ``corners`` int64[n, 2]: level-0 (x, y), in the file's sequence.

    None: the file does not say. ``size``: side of a tile in px as the encoder sees it, ``size_level0``: in level-0 px;
    ``mpp``, ``slide_mpp``: exact micrometres per px of a tile and of level 0 (x, y), in files of ours; ``off_grid``:
    such a file was itself made from a list. ``magnification``, ``target``: nominal, of level 0 and of tiles.
    ``width``, ``height``: level-0 px of the slide, known to within ``slack``.
    """

    corners: I64
    size: int | None = None
    size_level0: int | None = None
    mpp: float | None = None
    slide_mpp: tuple[float, float] | None = None
    off_grid: bool = False
    magnification: float | None = None
    target: float | None = None
    overlap: int | None = None
    width: float | None = None
    height: float | None = None
    slack: float = 0.0

    @property
    def nominal_mpp(self) -> float | None:
        """Micrometres per px of a tile as far as the file says it, by magnification or exactly."""
        return self.mpp or (10.0 / self.target if self.target else None)

    def digest(self) -> str:
        """Return 32 hex digits of all that features depend on: coordinates, their sequence, and sizes."""
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "corners"}
        found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        found.update(np.ascontiguousarray(self.corners, "<i8").tobytes())
        return found.hexdigest()[:32]


def read_tile_list(uri: str) -> TileList:
    """Read the tiles that the file at ``uri`` lists. Raises InputError for what is no such list, StorageError."""
    name = store.redact(uri)
    try:
        with _open_h5(uri) as file:
            found = open_dataset(file, "coords", 2 * MOST_TILES)
            if found.ndim != 2 + (found.ndim == 3 and len(found) == 1) or found.shape[-1] != 2:
                raise ValueError(f"coords claims the shape {list(found.shape)}, not n x 2")
            if found.dtype.kind not in "iu":
                raise ValueError(f"coords are {found.dtype}, not whole px of level 0 (STAMP writes micrometres)")
            corners = np.asarray(found[...]).reshape(-1, 2)
            said = {**_attributes_of(file), **_attributes_of(found)}
        if corners.size and (int(corners.min()) < -_FARTHEST or int(corners.max()) > _FARTHEST):
            raise ValueError(f"coords reach from {corners.min()} to {corners.max()}, which are no px of a slide")
        return _make_list(corners.astype(np.int64), said)
    except NotFound as error:
        raise InputError(
            f"there is no file of tiles at {name}: name a TRIDENT or CLAM .h5 file, or its folder"
        ) from error
    except StorageError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} is no list of tiles ({reason}): give a .h5 file with 'coords', as TRIDENT, CLAM and "
            "'wsi-mmm export --to h5' write it"
        ) from error


def _open_h5(uri: str) -> Any:
    if store.is_local(uri):
        path = store.local_path(uri)
        if path.is_dir():
            raise ValueError("it is a folder")
        if not path.exists():
            raise NotFound(f"no file at {store.redact(uri)}")
        if not path.is_file():
            raise ValueError("it is no ordinary file")
        return h5py.File(path, "r", locking=False)
    data = store.read_bytes(uri)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 30} GiB")
    return h5py.File(io.BytesIO(data), "r")


def open_dataset(file: Any, name: str, most: int) -> Any:
    """Return a data set of an HDF5 file that holds its own numbers. ValueError for none, for one that claims more than
    ``most`` of them, or that lies in other files: those could be any on this machine."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise ValueError(f"{name} is no data set of this file")
    found = file[name]
    if found.external or found.is_virtual:
        raise ValueError(f"{name} lies in other files")
    if found.ndim not in (2, 3) or found.size > most or found.dtype.kind not in "iuf":
        raise ValueError(f"{name} claims {found.dtype}{list(found.shape)}")
    if math.prod(found.chunks or (0,)) > most:
        raise ValueError(f"{name} claims chunks of {list(found.chunks)}")
    return found


_KNOWN = (
    "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "level0_width",
    "level0_height", "patch_level", "downsample", "custom_downsample", "level_dim", "mpp", "level0_mpp_x",
    "level0_mpp_y", "off_grid",
)  # fmt: skip


def _attributes_of(item: Any) -> dict[str, tuple[float, ...]]:
    """The known attributes that hold one or two finite numbers; what is larger is not read."""
    found = {}
    for name in _KNOWN:
        if name in item.attrs and item.attrs.get_id(name).get_space().get_simple_extent_npoints() <= 2:
            try:
                values = np.atleast_1d(np.asarray(item.attrs[name])).astype(np.float64).ravel()
            except (TypeError, ValueError):
                continue  # a text such as 'NA'
            if len(values) and np.isfinite(values).all():
                found[name] = tuple(values.tolist())
    return found


def _make_list(corners: I64, said: Mapping[str, tuple[float, ...]]) -> TileList:
    one = {name: values[0] for name, values in said.items()}
    positive = {name: value for name, value in one.items() if value > 0}
    size = _whole_px("patch_size", one)
    facts: dict[str, Any] = {
        "size": size, "size_level0": _whole_px("patch_size_level0", one), "mpp": positive.get("mpp"),
        "magnification": positive.get("level0_magnification"), "target": positive.get("target_magnification"),
        "overlap": _whole_px("overlap", one, least=0), "width": positive.get("level0_width"),
        "height": positive.get("level0_height"), "off_grid": bool(one.get("off_grid")),
    }  # fmt: skip
    if "level0_mpp_x" in positive and "level0_mpp_y" in positive:
        facts["slide_mpp"] = positive["level0_mpp_x"], positive["level0_mpp_y"]
    if size and facts["mpp"] is None and facts["magnification"] and facts["target"]:
        # TRIDENT reads tiles of this size; the attribute is the same quotient rounded down.
        read = round(size * facts["magnification"] / facts["target"])
        if facts["size_level0"] is not None and abs(read - facts["size_level0"]) > 1:
            raise ValueError(
                f"tiles are {facts['size_level0']} px of level 0 wide by patch_size_level0, {read} by magnifications"
            )
        facts["size_level0"] = read
    if size and facts["size_level0"] is None and "patch_level" in one:
        facts |= _clam_facts(size, said)
    return TileList(corners=corners, **facts)


def _clam_facts(size: int, said: Mapping[str, tuple[float, ...]]) -> dict[str, Any]:
    """Sizes of tiles that are px of a level. Empty where the file does not say how wide those are."""
    level0 = said["patch_level"][0] == 0
    if "downsample" not in said and not level0:
        return {}
    downsample = said.get("downsample", (1.0,))
    across, down = downsample[0], downsample[-1]
    factor = said.get("custom_downsample", (1.0,))[0]
    if not (across >= 1 and down >= 1 and factor >= 1):
        raise ValueError(f"downsample is {across:g}, where 1 or more is needed")
    facts: dict[str, Any] = {"size_level0": _bounded_px("downsample", round(size * across * factor))}
    if len(said.get("level_dim", ())) == 2:
        width, height = said["level_dim"]
        facts |= {"width": width * across, "height": height * down, "slack": 1.01 * max(across, down)}
    return facts


def _whole_px(name: str, said: Mapping[str, float], least: int = 1) -> int | None:
    if name not in said:
        return None
    value = said[name]
    if value != math.floor(value) or value < least:
        raise ValueError(f"{name} is {value:g}, no number of px")
    return _bounded_px(name, int(value))


def _bounded_px(name: str, value: int) -> int:
    if value > _WIDEST:
        raise ValueError(f"{name} makes tiles of {value} px")
    return value


# ---------------------------------------------------------------- which file is of which slide

_NAMES = ("{}_patches.h5", "{}.h5", "patches/{}_patches.h5", "patches/{}.h5", "{}/features.h5")
"""Files of a slide in a folder: of TRIDENT, of CLAM, of either one folder up, and beside features of ours."""


def match_tile_files(where: str, slides: Sequence[tuple[str, str]]) -> list[tuple[str | None, str]]:
    """Return the file that lists the tiles of each slide (id, name), or why there is none.

    ``where``: one file, for one slide, or a folder or prefix with a file per slide, named by its id or name.
    """
    if not _is_folder(where):
        if len(slides) > 1 and store.is_local(where) and not store.exists(where):
            missing = f"there is no {where}: name the .h5 file that lists the tiles of a slide, or a folder of files"
            return [(None, missing) for _ in slides]
        several = (
            f"{store.redact(where)} lists the tiles of one slide, and {len(slides)} are given: name a folder of files"
        )
        return [(None, several) if len(slides) > 1 else (where, "") for _ in slides]
    there = None if store.is_local(where) else set(store.list_uris(where))
    found = [_find_file(where, names, there) for names in slides]
    users = Counter(found)
    return [
        (uri, "") if uri is not None and users[uri] == 1 else (None, _why_none(where, names, uri))
        for names, uri in zip(slides, found, strict=True)
    ]


def _is_folder(where: str) -> bool:
    if store.is_local(where):
        return store.local_path(where).is_dir()
    return not where.lower().endswith((".h5", ".hdf5"))


def _find_file(where: str, names: Sequence[str], there: Container[str] | None) -> str | None:
    """``there``: all files below a prefix; None asks the file system."""
    places = (store.join(where, text.format(name)) for name in dict.fromkeys(names) for text in _NAMES)
    return next((uri for uri in places if (store.exists(uri) if there is None else uri in there)), None)


def _why_none(where: str, names: tuple[str, str], uri: str | None) -> str:
    own, name = names
    if uri is not None:
        return f"{store.redact(uri)} would be the list of several slides named {name}: name that of this slide {own}.h5"
    return (
        f"no list of tiles for {name} in {store.redact(where)}: looked for {name}_patches.h5 (TRIDENT) and {name}.h5 "
        f"(CLAM), there and in patches/, and for {name}/features.h5 (wsi-mmm export --to h5)"
    )
