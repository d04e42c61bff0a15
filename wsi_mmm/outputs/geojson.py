"""`GeoJSONWriter`: objects -> the GeoJSON that QuPath 0.5 to 0.7 imports, streamed."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from wsi_mmm.outputs.polygons import Rounded, chunks, round_valid
from wsi_mmm.outputs.sink import FileSink
from wsi_mmm.types import F64, I64, REGION_KINDS, TILE_KINDS, Objects, TaskInfo

NAMESPACE = uuid.UUID("5b2ab1f4-53a6-5c5e-9d6e-0c8a35f0b6a1")  # of every object id wsi_mmm gives
MANY = 5_000  # regions beyond this number are detections: QuPath handles few annotations well
_CHUNK = 10_000  # objects formatted at a time
_LIMIT = 10_000_000 * 100  # hundredths of a px below which coordinates are written by table

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

    def write(self, objects: Objects, complete: Callable[[Objects], Objects] | None = None) -> None:
        """Append objects of one of the writer's tasks, in their order.

        ``complete`` is given the objects as they are published, a part at a time, and returns them with what else is
        to be said of them.
        """
        for rounded in _round_ahead(chunks(objects, _CHUNK)):
            self.repaired += rounded.repaired
            self.dropped += rounded.dropped
            if len(rounded.objects):
                self._write_chunk(complete(rounded.objects) if complete else rounded.objects)

    def _write_chunk(self, safe: Objects) -> None:
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


# ---------------------------------------------------------------- coordinates


def coordinate_texts(objects: Objects) -> list[bytes]:
    """Per object the JSON of its polygon, rings closed: ``[[[x,y],...],[hole...]]``, at most two decimals.

    A coordinate is at most seven digits and two decimals: three table look-ups of four bytes each (thousands, the rest,
    the decimals). Bytes that a number does not need are zero and are deleted from the whole text at once.
    """
    if not len(objects):
        return []
    closed = np.insert(np.arange(len(objects.coords)), objects.ring_offsets[1:], objects.ring_offsets[:-1])
    ring_ends = objects.ring_offsets[1:] + np.arange(len(objects.ring_offsets) - 1)
    values = np.rint(objects.coords * 100).astype(np.int64)[closed]
    text = _texts_by_table if values.min() >= 0 and values.max() < _LIMIT else _texts_one_by_one
    return text(values, ring_ends, ring_ends[objects.object_offsets[1:] - 1])


def _texts_by_table(values: I64, ring_ends: I64, object_ends: I64) -> list[bytes]:
    tables = _text_tables()
    words = np.empty((len(values), 7), np.uint32)
    for axis, column in ((0, 0), (1, 3)):
        whole, cents = np.divmod(values[:, axis].astype(np.uint32), np.uint32(100))
        high, low = np.divmod(whole, np.uint32(10_000))
        words[:, column] = tables[f"high{axis}"][high]
        words[:, column + 1] = tables["low"][low + np.uint32(10_000) * (high > 0)]
        words[:, column + 2] = tables[f"cents{axis}"][cents]
    comma, ring, end = tables["separators"]
    words[:, 6] = comma
    words[ring_ends, 6] = ring
    words[object_ends, 6] = end
    lines = words.tobytes().translate(None, b"\0").split(b"\n")
    return [b"[[%b]]" % line for line in lines[:-1]]


@cache
def _text_tables() -> dict[str, npt.NDArray[np.uint32]]:
    high = [str(n) if n else "" for n in range(1000)]
    low = [str(n) for n in range(10_000)] + [f"{n:04d}" for n in range(10_000)]
    cents = [f".{n:02d}".rstrip("0").rstrip(".") for n in range(100)]
    return {
        "high0": _pack_words(["[" + text for text in high]),
        "high1": _pack_words(high),
        "low": _pack_words(low),
        "cents0": _pack_words([text + "," for text in cents]),
        "cents1": _pack_words([text + "]" for text in cents]),
        "separators": _pack_words([",", "],[", "\n"]),
    }


def _pack_words(texts: list[str]) -> npt.NDArray[np.uint32]:
    return np.frombuffer(b"".join(text.encode().ljust(4, b"\0") for text in texts), np.uint32)


def _texts_one_by_one(values: I64, ring_ends: I64, object_ends: I64) -> list[bytes]:
    """The same for coordinates that are negative or very large: slower, rarely needed."""
    ends, last = set(ring_ends.tolist()), set(object_ends.tolist())
    out: list[bytes] = []
    parts: list[str] = []
    for i, (x, y) in enumerate(values.tolist()):
        parts.append(f"[{_hundredths_text(x)},{_hundredths_text(y)}]")
        if i in last:
            out.append(f"[[{''.join(parts)}]]".encode())
            parts = []
        else:
            parts.append("],[" if i in ends else ",")
    return out


def _hundredths_text(hundredths: int) -> str:
    whole, cents = divmod(abs(hundredths), 100)
    text = f"{whole}.{cents:02d}".rstrip("0").rstrip(".")
    return f"-{text}" if hundredths < 0 else text
