"""Features and blended maps as Zarr v3, and the files of other tools made from features."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.errors import GroupNotFoundError
from zarr.storage import LocalStore, ObjectStore

from wsi_mmm.errors import OptionError, StorageError
from wsi_mmm.plugins import import_package
from wsi_mmm.storage import store
from wsi_mmm.storage.store import published_folder
from wsi_mmm.types import F32, I64, U8, Grid, Mask, TaskInfo

_ROWS = 4096  # tiles per chunk of features
MAP_CHUNK, MAP_SHARD = 512, 2048  # map px
MAX_VALUES = 1 << 31
"""Numbers of a slide's features above which a store is refused: two million tiles of a thousand."""


@dataclass(frozen=True, slots=True)
class SlideFeatures:
    """``vectors`` float32[n, D], ``coords`` int64[n, 2] level-0 (x, y), and the attributes of the store."""

    vectors: F32
    coords: I64
    attributes: Mapping[str, Any]


def write_features(uri: str, features: F32, coords: I64, attributes: Mapping[str, Any]) -> None:
    """features.zarr: ``features`` float32[n, D], ``coords`` int64[n, 2], with ``attributes`` on both and the group."""
    with published_folder(uri) as place:
        group = zarr.create_group(zarr_store(place), attributes=dict(attributes))
        for name, values in (("features", np.asarray(features, np.float32)), ("coords", np.asarray(coords, np.int64))):
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=(max(1, min(_ROWS, len(values))), max(1, values.shape[1])),
                dtype=values.dtype,
                compressors=BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
                attributes=dict(attributes),
            )
            if values.size:
                array[:] = values


def read_features(uri: str) -> SlideFeatures:
    """The features that `write_features` wrote. StorageError if there are none, or some are not finite."""
    try:
        group = zarr.open_group(zarr_store(uri), mode="r")
        vectors, coords = (_read_array(group, name) for name in ("features", "coords"))
        return check_features(SlideFeatures(vectors, coords, dict(group.attrs)), uri)
    except (GroupNotFoundError, KeyError, FileNotFoundError, ValueError) as error:
        raise StorageError(f"{store.redact(uri)} is no features.zarr; wsi-mmm embed makes them") from error


def read_attributes(uri: str) -> dict[str, Any]:
    """The attributes of what `write_features` wrote, without its arrays. StorageError if there is none."""
    try:
        return dict(zarr.open_group(zarr_store(uri), mode="r").attrs)
    except (GroupNotFoundError, KeyError, FileNotFoundError, ValueError) as error:
        raise StorageError(f"{store.redact(uri)} is no features.zarr; wsi-mmm embed makes them") from error


def read_feature_blocks(uri: str, leave_out: Mask | None = None) -> Iterator[F32]:
    """The vectors float32[n, D] that `write_features` wrote, some thousands at a time; ``leave_out`` bool[N]: tiles
    without. StorageError as of `read_features`."""
    try:
        array = _find_array(zarr.open_group(zarr_store(uri), mode="r"), "features")
        for start in range(0, array.shape[0], _ROWS):
            vectors = np.asarray(array[start : start + _ROWS], np.float32)
            if leave_out is not None:
                vectors = vectors[~leave_out[start : start + _ROWS]]
            yield check_features(SlideFeatures(vectors, np.zeros((len(vectors), 2), np.int64), {}), uri).vectors
    except (GroupNotFoundError, KeyError, FileNotFoundError, ValueError) as error:
        raise StorageError(f"{store.redact(uri)} is no features.zarr; wsi-mmm embed makes them") from error


def check_features(features: SlideFeatures, uri: str) -> SlideFeatures:
    """Return ``features``. StorageError naming ``uri`` when some are NaN or infinite."""
    found = features.vectors
    if found.size and not (np.isfinite(found.min()) and np.isfinite(found.max())):
        count = int((~np.isfinite(found).all(axis=1)).sum())
        text = f"holds NaN or infinity in the features of {count} of {len(found)} tiles"
        raise StorageError(f"{store.redact(uri)} {text}: embed the slide again, or leave it out")
    return features


def _read_array(group: zarr.Group, name: str) -> Any:
    """A whole array [n, D]. ValueError as of `_find_array`."""
    return np.asarray(_find_array(group, name)[:])


def _find_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array [n, D]; ValueError for one that claims more than a slide has: chunks left out take no file."""
    array = group[name]
    if not isinstance(array, zarr.Array) or array.ndim != 2 or array.size > MAX_VALUES:
        raise ValueError(f"{name} is no array of tiles")
    return array


def export(source: str, target: str, name: str = "") -> None:
    """features.zarr at ``source`` -> ``target`` in the format ``name`` (see `FORMATS`), else as its ending says."""
    name = name or target.rsplit(".", 1)[-1]
    if name not in FORMATS:
        raise OptionError(f"unknown export {name!r}; known: {', '.join(FORMATS)}")
    store.write_bytes(target, FORMATS[name](read_features(source)))


def as_h5(features: SlideFeatures) -> bytes:
    """HDF5 as TRIDENT, TITAN and CLAM read it: ``coords`` with the attributes, ``features``.

    CLAM's reader of tiles takes ``patch_size`` px of level ``patch_level``: that is said where tiles are px of level 0.
    """
    buffer = io.BytesIO()
    said = features.attributes
    with h5py.File(buffer, "w") as file:
        coords = file.create_dataset("coords", data=np.asarray(features.coords, np.int64))
        vectors = file.create_dataset("features", data=np.asarray(features.vectors, np.float32))
        for name, value in said.items():
            coords.attrs[name] = value if isinstance(value, int | float | str) else json.dumps(value)
        if said.get("patch_size", 0) == said.get("patch_size_level0"):
            coords.attrs["patch_level"] = 0
        for name in ("encoder", "name"):
            vectors.attrs[name] = str(said.get(name, ""))
    return buffer.getvalue()


STAMP_FORMAT = "2.1.0"
"""The first version of STAMP that reads the attributes `as_stamp` writes; older ones then say that they are older."""

_STAMP_NAMES = {
    ("uni", "cls"): "uni",
    ("uni2-h", "cls"): "uni2",
    ("virchow", "cls"): "virchow",
    ("virchow", "cls+patch_mean"): "virchow-full",
    ("virchow2", "cls"): "virchow2",
    ("h-optimus-0", "cls"): "h-optimus-0",
    ("h-optimus-1", "cls"): "h-optimus-1",
    ("gigapath", "cls"): "gigapath",
    ("mstar", "cls"): "mstar",
    ("dinobloom-s", "cls"): "dino-bloom",
}
"""(encoder, pooling) -> what STAMP calls the extractor of these vectors."""


def extractor_name(said: Mapping[str, Any]) -> str:
    """STAMP's name of the encoder that made the vectors with these attributes; of others ours."""
    encoder, pooling = str(said.get("encoder", "")), str(said.get("pooling", ""))
    return _STAMP_NAMES.get((encoder, pooling)) or "-".join(filter(None, (encoder, pooling)))


def as_stamp(features: SlideFeatures) -> bytes:
    """HDF5 as STAMP reads it: ``feats``, ``coords`` float32 in micrometres, the attributes on the file.

    StorageError for features that do not say how many micrometres a level-0 px is wide.
    """
    said = features.attributes
    try:
        scale = np.array([float(said["level0_mpp_x"]), float(said["level0_mpp_y"])])
        side, mpp = int(said["patch_size"]), float(said["mpp"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"the features of {said.get('name', 'this slide')} do not say the slide's resolution"
        raise StorageError(f"{text}, which STAMP needs: embed the slide again with --force") from error
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("coords", data=(features.coords * scale).astype(np.float32))
        file.create_dataset("feats", data=np.asarray(features.vectors, np.float32))
        file.attrs.update({
            "stamp_version": STAMP_FORMAT, "feat_type": "tile", "unit": "um", "tile_size_um": side * mpp,
            "tile_size_px": side, "code_hash": str(said.get("model_hash", ""))[:8],
            "extractor": extractor_name(said),
        })  # fmt: skip
    return buffer.getvalue()


def as_pt(features: SlideFeatures) -> bytes:
    """The tensor float32[n, D] that CLAM reads with ``torch.load``."""
    torch = import_package("torch", "the .pt export needs torch: pip install torch, or export h5")
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(features.vectors)), buffer)
    return buffer.getvalue()


def as_h5ad(features: SlideFeatures) -> bytes:
    """AnnData: X is the features, ``obsm["spatial"]`` the middle of each tile, ``uns["wsi_mmm"]`` the attributes."""
    anndata = import_package("anndata", "the .h5ad export needs anndata: pip install anndata, or export h5")
    middle = features.coords + int(features.attributes.get("patch_size_level0", 0)) / 2
    data = anndata.AnnData(X=features.vectors, obsm={"spatial": middle}, uns={"wsi_mmm": dict(features.attributes)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5ad"
        data.write_h5ad(path)
        return path.read_bytes()


FORMATS: dict[str, Callable[[SlideFeatures], bytes]] = {"h5": as_h5, "pt": as_pt, "h5ad": as_h5ad, "stamp": as_stamp}


def file_ending(name: str, *, beside: bool) -> str:
    """The ending of files of a format; ``beside``: next to those of other formats, so each needs its own."""
    if beside:
        return "stamp.h5" if name == "stamp" else name
    return "h5" if "stamp" in name or name == "slide-h5" else name


def write_map(
    uri: str, info: TaskInfo, channels: int, stride: int, grid: Grid, blocks: Iterable[tuple[tuple[int, int], U8]]
) -> None:
    """The blended map of a task, from which objects were made: uint8[channels, H, W] at ``uri``, map px = ``stride``
    target px; px that no block covers are 0.

    ``blocks``: corner (y, x) in map px and uint8[channels, h, w]; what lies beyond the slide is cut off. Attributes:
    task, kind, classes, mpp (of a map px), scale_x, scale_y (level-0 px per map px), value_scale (255 means 1.0).
    """
    height, width = (-(-size // stride) for size in (grid.height, grid.width))
    with published_folder(uri) as place:
        array = zarr.create_array(
            zarr_store(place),
            shape=(channels, height, width),
            chunks=(1, MAP_CHUNK, MAP_CHUNK),
            shards=(channels, MAP_SHARD, MAP_SHARD),
            dtype="uint8",
            fill_value=0,
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"),
            dimension_names=("channel", "y", "x"),
            attributes={
                "task": info.name, "kind": info.kind, "classes": list(info.classes), "mpp": grid.mpp * stride,
                "scale_x": grid.scale_x * stride, "scale_y": grid.scale_y * stride, "value_scale": 255,
            },
        )  # fmt: skip
        for (y, x), block in blocks:
            part = block[:, : height - y, : width - x]
            if part.size and part.any():
                array[:, y : y + part.shape[1], x : x + part.shape[2]] = part


def zarr_store(uri: str) -> LocalStore | ObjectStore[Any]:
    """The Zarr store at ``uri``: a folder, or a prefix of an object store."""
    if store.is_local(uri):
        return LocalStore(store.local_path(uri))
    return ObjectStore(store.object_store(uri))
