"""`GeoJSONWriter`: objects -> the GeoJSON that QuPath 0.5 to 0.7 imports, streamed."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from wsi_mmm.outputs.numbertext import coordinate_texts
from wsi_mmm.outputs.polygons import Rounded, round_valid
from wsi_mmm.outputs.ragged import part
from wsi_mmm.outputs.sink import FileSink
from wsi_mmm.types import F64, REGION_KINDS, TILE_KINDS, Objects, TaskInfo

NAMESPACE = uuid.UUID("5b2ab1f4-53a6-5c5e-9d6e-0c8a35f0b6a1")  # of every object id wsi_mmm gives
MANY = 5_000  # regions beyond this number are detections: QuPath handles few annotations well
_CHUNK = 10_000  # objects formatted at a time

_KINDS = {"instances": "detection", "detect": "detection", **dict.fromkeys(TILE_KINDS, "tile")}


def object_type(kind: str, count: int) -> str:
    """QuPath's objectType for ``count`` objects of a task of this kind."""
    if kind in REGION_KINDS:
        return "annotation" if count <= MANY else "detection"
    return _KINDS.get(kind, "detection")


class GeoJSONWriter:
    """Streams objects to one FeatureCollection, one feature per line; memory does not grow with their number.

    ``counts`` (task name -> objects to come, as far as known) decides whether regions are annotations or, when they
    are many, detections. Ids are UUIDs v5 of (``slide_fingerprint``, task, geometry): reruns give the same bytes.
    Geometry is made valid *after* rounding to 2 decimals (see `round_valid`); ``repaired`` and ``dropped`` count.
    The file appears at `close`, whole; leaving the ``with`` block by an exception leaves nothing.
    """

    def __init__(
        self,
        path: str | Path,
        slide_fingerprint: str,
        tasks: Sequence[TaskInfo],
        gzip: bool = True,
        *,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self.repaired = 0
        self.dropped = 0
        self.written = 0
        self._property_texts = {task.name: _property_texts(task, (counts or {}).get(task.name, 0)) for task in tasks}
        self._names = {task.name: uuid.uuid5(NAMESPACE, f"{slide_fingerprint}/{task.name}").bytes for task in tasks}
        self._sink = FileSink(path, gzip=gzip)
        self._sink.write(b'{"type":"FeatureCollection","features":[')

    def write(self, objects: Objects) -> None:
        """Append objects of one of the writer's tasks, in their order."""
        starts = range(0, len(objects), _CHUNK)
        for rounded in _round_ahead(part(objects, start, min(start + _CHUNK, len(objects))) for start in starts):
            self._write_chunk(rounded)

    def _write_chunk(self, rounded: Rounded) -> None:
        self.repaired += rounded.repaired
        self.dropped += rounded.dropped
        safe = rounded.objects
        if not len(safe):
            return
        tails = self._property_texts[safe.task]
        geometries = coordinate_texts(safe)
        rows = zip(
            _object_ids(self._names[safe.task], geometries),
            geometries,
            [tails[k] for k in safe.class_index.tolist()],
            _measurement_texts(safe.measurements, len(safe)),
            strict=True,
        )
        lines = [
            b'{"type":"Feature","id":"%b","geometry":{"type":"Polygon","coordinates":%b},"properties":{%b%b}}' % row
            for row in rows
        ]
        self._sink.write((b",\n" if self.written else b"\n") + b",\n".join(lines))
        self.written += len(lines)

    def close(self) -> int:
        """Finish the file; returns the number of objects in it."""
        self._sink.write(b"\n]}\n")
        self._sink.close()
        return self.written

    def abort(self) -> None:
        """Give up: no file is left."""
        self._sink.abort()

    def __enter__(self) -> GeoJSONWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _round_ahead(chunks: Iterable[Objects]) -> Iterator[Rounded]:
    """`round_valid` of each chunk, one ahead in a thread: GEOS, 60 % of the work, runs beside Python."""
    with ThreadPoolExecutor(1, "round") as pool:
        waiting: Future[Rounded] | None = None
        for chunk in chunks:
            coming = pool.submit(round_valid, chunk)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _property_texts(task: TaskInfo, count: int) -> list[bytes]:
    """Per class: objectType and classification, as they stand in ``properties``; the last one has no class (-1)."""
    kind = "tile" if task.draws_tiles else object_type(task.kind, count)
    pairs = zip(task.classes, task.colors, strict=True)
    classifications = [{"name": name, "color": [int(c) for c in color]} for name, color in pairs]
    named = [f'"objectType":"{kind}","classification":{_compact_json(c)}'.encode() for c in classifications]
    return [*named, f'"objectType":"{kind}"'.encode()]


def _compact_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _object_ids(namespace: bytes, geometries: Sequence[bytes]) -> list[bytes]:
    """``uuid.uuid5(namespace, geometry)`` as text, without an object per UUID."""
    digests = b"".join([hashlib.sha1(namespace + g, usedforsecurity=False).digest() for g in geometries])
    raw = np.frombuffer(digests, np.uint8).reshape(-1, 20)[:, :16].copy()
    raw[:, 6] = raw[:, 6] & 0x0F | 0x50  # version 5
    raw[:, 8] = raw[:, 8] & 0x3F | 0x80  # the variant of RFC 9562
    digits = np.frombuffer(raw.tobytes().hex().encode(), np.uint8).reshape(-1, 32)
    text = np.insert(digits, (8, 12, 16, 20), ord("-"), axis=1).tobytes()
    return [text[i : i + 36] for i in range(0, len(text), 36)]


def _measurement_texts(measurements: Mapping[str, F64], count: int) -> list[bytes]:
    """Per object ``,"measurements":{...}`` or nothing; values that are not finite are left out."""
    if not measurements:
        return [b""] * count
    table = np.stack([np.asarray(values, np.float64) for values in measurements.values()], axis=1)
    cells = [f"{_compact_json(name)}:".replace("%", "%%") + "%.8g" for name in measurements]
    template = ',"measurements":{' + ",".join(cells) + "}\n"
    texts = (template * count % tuple(table.ravel().tolist())).encode().split(b"\n")[:-1]
    finite = np.isfinite(table)
    for i in np.flatnonzero(~finite.all(axis=1)).tolist():
        known = [cell % value for cell, value, good in zip(cells, table[i], finite[i], strict=True) if good]
        texts[i] = (',"measurements":{' + ",".join(known) + "}").encode() if known else b""
    return texts
