"""The published results of a slide, read back one by one: memory does not grow with the number of objects."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from pyarrow import parquet

from wsi_mmm.errors import OutputError
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
