"""The published results of a slide, read back one by one (memory does not grow with the number of objects), and what
they predict for the whole slide or a part of its tissue: the mean over tiles, or the prediction of a bag."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from pyarrow import parquet

from wsi_mmm.empaia.bodies import Polygon
from wsi_mmm.empaia.geometry import meeting
from wsi_mmm.errors import JobError, OutputError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.storage import store
from wsi_mmm.types import F64


@dataclass(frozen=True, slots=True)
class Outline:
    """An object: ``rings`` float64[n, 2] level-0 px, not closed, the outside first; its class by name; its numbers."""

    rings: list[F64]
    class_name: str | None
    numbers: Mapping[str, float]


class SlideFacts(TypedDict, total=False):
    """The entries of slide.json that are read here."""

    objects: dict[str, int]
    files: dict[str, str]
    mpp_effective: float
    answers: dict[str, float | None] | None


class _Properties(TypedDict, total=False):
    objectType: str
    classification: dict[str, str]
    measurements: dict[str, float]


class _Feature(TypedDict):
    geometry: dict[str, list[list[tuple[float, float]]]]
    properties: _Properties


@dataclass(frozen=True, slots=True)
class Results:
    """The folder of one slide, and the contents of its slide.json."""

    folder: str
    facts: SlideFacts

    def outlines(self, task: str) -> Iterator[Outline]:
        """The objects of a task that draws them, in the file's order."""
        counts = self.facts["objects"]
        names = list(counts)
        first = sum(counts[name] for name in names[: names.index(task)])
        with _open_lines(store.join(self.folder, self.facts["files"]["geojson"])) as file:
            drawn = (one for one in map(_parse_feature, file) if one is not None)
            for number, one in enumerate(drawn):
                if number >= first + counts[task]:
                    return
                if number >= first:
                    yield _read_outline(one)

    def tiles(self) -> dict[str, npt.NDArray[np.generic]]:
        """Columns of the table of tiles; numbers that nobody knows are NaN."""
        data = store.read_bytes(store.join(self.folder, self.facts["files"]["tiles"]))
        table = parquet.read_table(io.BytesIO(data))
        return {name: table[name].to_numpy() for name in table.column_names}


def results_at(folder: str) -> Results:
    """The results in ``folder``. OutputError when they cannot be read."""
    try:
        facts = json.loads(store.read_bytes(store.join(folder, "slide.json")))
        return Results(folder, facts)
    except ValueError as error:
        raise OutputError(
            f"{store.redact(folder)}: slide.json cannot be read; remove the folder and run again"
        ) from error


def _parse_feature(line: bytes) -> _Feature | None:
    """The object of a line of a GeoJSON file of ours; None for other lines, and for tiles."""
    if not line.startswith(b'{"type":"Feature",'):
        return None
    found: _Feature = json.loads(line.rstrip(b",\n"))
    return None if found["properties"]["objectType"] == "tile" else found


def _read_outline(found: _Feature) -> Outline:
    properties = found["properties"]
    rings = [np.array(ring[:-1], np.float64) for ring in found["geometry"]["coordinates"]]
    return Outline(rings, properties.get("classification", {}).get("name"), properties.get("measurements", {}))


@contextmanager
def _open_lines(uri: str) -> Iterator[Iterable[bytes]]:
    """The lines of a file, unpacked; one in a bucket comes to this machine's disk first."""
    with tempfile.TemporaryFile() if not store.is_local(uri) else store.local_path(uri).open("rb") as raw:
        if not store.is_local(uri):
            raw.write(store.read_bytes(uri))
            raw.seek(0)
        if not uri.endswith(".gz"):
            yield raw
            return
        with gzip.open(raw, "rb") as unpacked:
            yield unpacked


# ------------------------------------------------------------------------ predictions for a whole slide


def slide_class(results: Results, task: TaskCard) -> int | None:
    """The likeliest class of the slide, by the mean over its tiles; None when there is nothing to go by."""
    return _likeliest_class(_mean_probabilities(_class_table(results, task)))


def tissue_classes(results: Results, task: TaskCard, tissue: Sequence[Polygon]) -> list[int | None]:
    """The likeliest class of each part of the tissue, by the tiles that meet it; that of the slide where none does."""
    table, whole = _class_table(results, task), slide_class(results, task)
    if task.head == "bag":
        return [whole] * len(tissue)
    found = [_likeliest_class(_mean_probabilities(table[met])) for met in meeting(tissue, _tile_boxes(results))]
    return [whole if one is None else one for one in found]


def slide_value(results: Results, task: TaskCard) -> float:
    """The slide's number: the answer of a bag, or the mean over tiles; of several numbers the first. JobError: none."""
    names = [task.name, *(f"{task.name}:{name}" for name in task.classes)]
    return _finite_mean(_read_columns(results, task, names)[0])


def slide_values(results: Results, task: TaskCard) -> list[float]:
    """One number per class of the task."""
    return [_finite_mean(one) for one in _read_columns(results, task, [f"{task.name}:{name}" for name in task.classes])]


def _finite_mean(values: F64) -> float:
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise JobError("No tissue was found that could be judged, so there are no results.")
    return float(finite.mean())


def _class_table(results: Results, task: TaskCard) -> F64:
    """float64[n, classes]: the probabilities of each tile, or of the bag."""
    columns = _read_columns(results, task, [f"{task.name}:{name}" for name in task.classes])
    return np.column_stack(columns) if columns else np.zeros((0, len(task.classes)))


def _read_columns(results: Results, task: TaskCard, names: Sequence[str]) -> list[F64]:
    """Those of ``names`` that there are, float64[n] each: of tiles, or of the bag; empty ones when there are none."""
    source: Mapping[str, npt.ArrayLike] = results.tiles()
    if task.head == "bag":
        source = {name: [value] for name, value in (results.facts.get("answers") or {}).items() if value is not None}
    found = [np.asarray(source[name], np.float64) for name in names if name in source]
    return found or [np.zeros(0) for _ in names]


def _mean_probabilities(table: F64) -> F64:
    known = table[np.isfinite(table).all(axis=1) & (table.sum(axis=1) > 0)]
    return np.asarray(known.mean(axis=0)) if len(known) else np.zeros(table.shape[1])


def _likeliest_class(chances: F64) -> int | None:
    return int(np.argmax(chances)) if chances.any() else None


def _tile_boxes(results: Results) -> F64:
    """Level-0 rectangles float64[n, 4] of the tiles."""
    tiles = results.tiles()
    x, y, width, height = (tiles[name].astype(np.float64) for name in ("x", "y", "width0", "height0"))
    return np.column_stack([x, y, x + width, y + height])
