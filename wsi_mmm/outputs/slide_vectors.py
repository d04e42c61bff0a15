"""Vectors of slides: the file beside a slide's features, the form that STAMP reads, and tables of many slides."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wsi_mmm.errors import InputError, NotFound, StorageError
from wsi_mmm.outputs.exports import STAMP_FORMAT, export, extractor_name, file_ending
from wsi_mmm.plugins import import_package
from wsi_mmm.storage import store
from wsi_mmm.types import F32

SLIDE_FILE = "slide_features.h5"
"""The file, in the folder of a slide, that holds its vector."""

MAX_NUMBERS = 1 << 20
"""Numbers in a slide's vector above which a file is refused."""

READERS = 16  # files read at once: on storage every one is a request
_SHARED = ("encoder", "model_hash", "slide_hash", "mpp", "patch_size", "overlap")
"""Attributes in which the slides of a table must agree."""


@dataclass(frozen=True, slots=True)
class SlideVector:
    """``vector`` float32[D] and the attributes of its file: those of the tiles' features, and ``slide_encoder``,
    ``slide_kind``, ``slide_hash``, ``slide_licence`` of what made it."""

    vector: F32
    attributes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The id of the slide."""
        return str(self.attributes.get("name", ""))


def slide_h5(vector: F32, attributes: Mapping[str, Any]) -> bytes:
    """HDF5 as TRIDENT writes vectors of slides: ``features`` float32[D], with the attributes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        _set_attributes(file.create_dataset("features", data=np.asarray(vector, np.float32)), attributes)
    return buffer.getvalue()


def _set_attributes(target: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        target.attrs[name] = value if isinstance(value, int | float | str) else json.dumps(value)


def read_slide_vector(uri: str) -> SlideVector:
    """Return the vector that `slide_h5` wrote at ``uri``. StorageError: none, damaged, or not finite."""
    try:
        with h5py.File(io.BytesIO(store.read_bytes(uri)), "r") as file:
            values = file.get("features") if isinstance(file.get("features", getlink=True), h5py.HardLink) else None
            if not isinstance(values, h5py.Dataset) or values.external or values.is_virtual:
                raise ValueError("features is no data set of this file")
            if values.ndim != 1 or values.size > MAX_NUMBERS or values.dtype.kind != "f":
                raise ValueError(f"features claims {values.dtype}{list(values.shape)}")
            found = SlideVector(
                np.asarray(values[:], np.float32), {name: _plain(v) for name, v in values.attrs.items()}
            )
    except NotFound as error:
        raise StorageError(f"{store.redact(uri)}: the slide has no vector; {_REMEDY}") from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{store.redact(uri)} is no vector of a slide ({error}); {_REMEDY}") from error
    if not np.isfinite(found.vector).all():
        raise StorageError(f"{store.redact(uri)} holds NaN or infinity: embed the slide again with --force")
    return found


_REMEDY = "wsi-mmm embed --slide mean, or --slide MODEL, adds one to the features that are there"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def as_stamp_slide(found: SlideVector) -> bytes:
    """HDF5 as STAMP writes and reads vectors of slides: ``feats`` float32[D], ``feat_type`` "slide" on the file."""
    said = found.attributes
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("feats", data=found.vector)
        file.attrs.update({
            "stamp_version": STAMP_FORMAT, "version": STAMP_FORMAT, "feat_type": "slide",
            "encoder": str(said.get("slide_encoder", "")), "precision": "torch.float32",
            "code_hash": str(said.get("slide_hash", ""))[:8], "extractor": extractor_name(said),
        })  # fmt: skip
    return buffer.getvalue()


SLIDE_FORMATS: dict[str, tuple[str, Callable[[SlideVector], bytes]]] = {
    "slide-h5": ("h5", lambda found: slide_h5(found.vector, found.attributes)),
    "slide-stamp": ("stamp.h5", as_stamp_slide),
}
"""Formats of one file per slide: its ending beside the features, and its bytes."""


def export_file(features: str, target: str, name: str) -> None:
    """The features of a slide, or the vector beside them, -> ``target`` in a format of `FORMATS` or `SLIDE_FORMATS`;
    ``features``: the URI of a features.zarr."""
    if name not in SLIDE_FORMATS:
        export(features, target, name)
    elif target != slide_file(features):  # has that form already
        store.write_bytes(target, SLIDE_FORMATS[name][1](read_slide_vector(slide_file(features))))


def file_beside(features: str, name: str) -> str:
    """The file of an export beside the features that it is made of."""
    if name in SLIDE_FORMATS:
        return f"{slide_file(features).removesuffix('h5')}{SLIDE_FORMATS[name][0]}"
    return f"{features.removesuffix('.zarr')}.{file_ending(name, beside=True)}"


def slide_file(features: str) -> str:
    """The file of the slide's vector beside its features.zarr."""
    return store.join(features.rstrip("/").rpartition("/")[0] or ".", SLIDE_FILE)


# ---------------------------------------------------------------- tables


def export_table(features: Sequence[str], target: str, name: str) -> int:
    """The vectors beside these features -> one file in a format of `TABLE_FORMATS`; the number of slides.

    StorageError: a slide has none. InputError: two were not made alike, or have one id.
    """
    with ThreadPoolExecutor(READERS, "wsi-mmm-slides") as threads:
        found = list(threads.map(lambda uri: read_slide_vector(slide_file(uri)), features))
    check_table(found)
    store.write_bytes(target, TABLE_FORMATS[name](found))
    return len(found)


def check_table(found: Sequence[SlideVector]) -> None:
    """InputError naming the first two slides whose vectors cannot stand in one table."""
    names: set[str] = set()
    for one in found:
        for key in _SHARED:
            mine, theirs = (str(each.attributes.get(key)) for each in (one, found[0]))
            if mine != theirs:
                text = f"{one.name} has {key} {mine[:40]}, {found[0].name} has {theirs[:40]}"
                remedy = "export the folder of each encoder by itself" if key == "encoder" else "embed them alike"
                raise InputError(f"the vectors of two slides were not made alike ({text}): {remedy}")
        if one.name in names:
            raise InputError(f"two slides have the id {one.name!r}: export them apart")
        names.add(one.name)


def as_slides_h5(found: Sequence[SlideVector]) -> bytes:
    """HDF5: ``features`` float32[N, D], ``slides`` their N ids, and the attributes that all share."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        rows = np.stack([one.vector for one in found])
        _set_attributes(file.create_dataset("features", data=rows), _shared_attributes(found))
        file.create_dataset("slides", data=[one.name for one in found], dtype=h5py.string_dtype())
    return buffer.getvalue()


def as_slides_h5ad(found: Sequence[SlideVector]) -> bytes:
    """AnnData with a row per slide: X is the vectors, the rows' names the ids, ``uns["wsi_mmm"]`` the attributes."""
    anndata = import_package("anndata", "the .h5ad export needs anndata: pip install anndata, or export slides-h5")
    data = anndata.AnnData(X=np.stack([one.vector for one in found]), uns={"wsi_mmm": _shared_attributes(found)})
    data.obs_names = [one.name for one in found]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slides.h5ad"
        data.write_h5ad(path)
        return path.read_bytes()


def _shared_attributes(found: Sequence[SlideVector]) -> dict[str, Any]:
    first = found[0].attributes
    return {
        name: value for name, value in first.items() if all(one.attributes.get(name) == value for one in found)
        and name != "name"
    }  # fmt: skip


TABLE_FORMATS: dict[str, Callable[[Sequence[SlideVector]], bytes]] = {
    "slides-h5": as_slides_h5,
    "slides-h5ad": as_slides_h5ad,
}
"""Formats of one file for many slides, ``slides.h5`` and ``slides.h5ad``."""


def table_file(folder: str, name: str) -> str:
    """The file of a table in a folder."""
    return store.join(folder, name.replace("-", ".", 1))
