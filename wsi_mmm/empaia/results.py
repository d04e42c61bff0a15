"""What a run has published of a slide, read back piece by piece: memory does not grow with the number of objects."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Results:
    """The folder of one slide, and what its slide.json says."""

    folder: str
    facts: Mapping[str, Any]

    def outlines(self, task: str) -> Iterator[Outline]:
        """The objects of a task that draws them, in the file's order."""
        counts: Mapping[str, int] = self.facts["objects"]
        names = list(counts)
        first = sum(counts[name] for name in names[: names.index(task)])
        with _opened(store.join(self.folder, self.facts["files"]["geojson"])) as file:
            drawn = (one for one in map(_feature, file) if one is not None)
            for number, one in enumerate(drawn):
                if number >= first + counts[task]:
                    return
                if number >= first:
                    yield _outline(one)

    def tiles(self) -> dict[str, npt.NDArray[Any]]:
        """Columns of the table of tiles; numbers that nobody knows are NaN."""
        data = store.read_bytes(store.join(self.folder, self.facts["files"]["tiles"]))
        table = parquet.read_table(io.BytesIO(data))
        return {name: table[name].to_numpy() for name in table.column_names}


def results_at(folder: str) -> Results:
    """What is published in ``folder``. OutputError when that cannot be read."""
    try:
        facts = json.loads(store.read_bytes(store.join(folder, "slide.json")))
        return Results(folder, facts)
    except ValueError as error:
        raise OutputError(
            f"{store.redact(folder)}: slide.json cannot be read; remove the folder and run again"
        ) from error


def _feature(line: bytes) -> dict[str, Any] | None:
    """The object of a line of a GeoJSON file of ours; None for other lines, and for tiles."""
    if not line.startswith(b'{"type":"Feature",'):
        return None
    found: dict[str, Any] = json.loads(line.rstrip(b",\n"))
    return None if found["properties"]["objectType"] == "tile" else found


def _outline(found: dict[str, Any]) -> Outline:
    said = found["properties"]
    rings = [np.array(ring[:-1], np.float64) for ring in found["geometry"]["coordinates"]]
    return Outline(rings, said.get("classification", {}).get("name"), said.get("measurements", {}))


@contextmanager
def _opened(uri: str) -> Iterator[Iterable[bytes]]:
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
