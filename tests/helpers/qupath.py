"""`check_qupath`: every rule that QuPath 0.5 to 0.7 puts on a GeoJSON file, checked without holding the file."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import shapely

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
OBJECT_TYPES = {"annotation", "detection", "cell", "tile"}
GEOMETRY_TYPES = {"Polygon", "MultiPolygon", "Point", "MultiPoint", "LineString", "MultiLineString"}
MAX_ANNOTATIONS = 5_000
SLIVER = 0.1  # px^2
_BATCH = 5_000
_KEPT = 20  # violations of one rule that are listed in full


@dataclass
class Report:
    """What was found: ``counts`` per broken rule, ``violations`` in words (the first 20 of each rule)."""

    features: int = 0
    object_types: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.counts

    def add(self, rule: str, where: str, detail: str = "") -> None:
        self.counts[rule] += 1
        if self.counts[rule] <= _KEPT:
            self.violations.append(f"{rule} at {where}: {detail}".rstrip(": "))

    def __str__(self) -> str:
        head = f"{self.features:,} features, {'accepted' if self.ok else f'rejected {dict(self.counts)}'}"
        return "\n".join([head, *self.violations])


def check_qupath(
    path: str | Path, *, size: tuple[int, int] | None = None, max_annotations: int = MAX_ANNOTATIONS
) -> Report:
    """Check the file; with ``size`` (width, height) also that everything lies on the slide."""
    report, ids, batch = Report(), set[bytes](), _Geometries(size)
    try:
        with _open(Path(path)) as stream:
            for index, feature in enumerate(_features(stream, report)):
                report.features += 1
                _check_feature(feature, f"feature {index}", report, ids, batch)
                if len(batch.owners) >= _BATCH:
                    batch.check(report)
    except UnicodeDecodeError as error:
        report.add("utf-8", "file", str(error))
    except (ValueError, EOFError, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        report.add("json", f"feature {report.features}", str(error))
    batch.check(report)
    if report.object_types["annotation"] > max_annotations:
        report.add("many-annotations", "file", f"{report.object_types['annotation']:,} annotations")
    return report


# ---------------------------------------------------------------- reading


def _open(path: Path) -> TextIO:
    raw: BinaryIO
    if path.suffix == ".gz":
        raw = gzip.GzipFile(path)  # type: ignore[assignment]
    elif path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        raw = archive.open(archive.namelist()[0])  # type: ignore[assignment]
    elif path.suffix in {".geojson", ".json"}:
        raw = path.open("rb")
    else:
        raise ValueError(f"QuPath does not know the ending {path.suffix!r}")
    return io.TextIOWrapper(raw, encoding="utf-8")


def _features(stream: TextIO, report: Report) -> Iterator[Any]:
    """The features of a FeatureCollection, of an array, or the single one, as they come."""
    text = _Text(stream, report)
    if text.peek() == "[":
        yield from text.array()
    elif text.peek() == "{":
        yield from _root_object(text, report)
    else:
        raise ValueError("the root is neither an object nor an array")
    if text.peek():
        raise ValueError("something follows the root")


def _root_object(text: _Text, report: Report) -> Iterator[Any]:
    rest: dict[str, Any] = {}
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if key == "features" and text.peek() == "[":
            rest[key] = True
            yield from text.array()
        else:
            rest[key] = text.value()
        text.comma("}")
    text.take("}")
    if rest.get("type") == "Feature":
        yield rest
    elif rest.get("type") != "FeatureCollection" or "features" not in rest:
        report.add("root", "file", "neither a FeatureCollection with features nor a Feature")


class _Text:
    """A JSON text read piece by piece."""

    def __init__(self, stream: TextIO, report: Report) -> None:
        self._stream, self._buffer, self._at = stream, "", 0
        self._decoder = json.JSONDecoder(
            parse_constant=lambda name: report.add("number", "file", name), object_pairs_hook=self._object
        )
        self._report = report

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._report.add("duplicate-key", "file", ", ".join(key for key, _ in pairs))
        return found

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\r\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"{character!r} expected, {self.peek()!r} found")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            if end == len(self._buffer) and self._more():
                continue  # a number may go on in the next piece
            self._at = end
            return value

    def array(self) -> Iterator[Any]:
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            self.comma("]")
        self.take("]")

    def comma(self, end: str) -> None:
        """A comma and something after it, or ``end``."""
        if self.peek() == end:
            return
        self.take(",")
        if self.peek() == end:
            raise ValueError(f"a comma before {end}")

    def _more(self) -> bool:
        piece = self._stream.read(max(1 << 18, len(self._buffer) - self._at))
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece)


# ---------------------------------------------------------------- one feature


def _check_feature(feature: Any, where: str, report: Report, ids: set[bytes], batch: _Geometries) -> None:
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        report.add("feature", where, "no Feature")
        return
    identity = feature.get("id")
    if not isinstance(identity, str) or not UUID.fullmatch(identity):
        report.add("id", where, f"{identity!r} is no UUID")
    else:
        packed = bytes.fromhex(identity.replace("-", ""))
        if packed in ids:
            report.add("id-unique", where, identity)
        ids.add(packed)
    for key in feature.keys() & {"objectType", "classification", "measurements", "name", "color", "isLocked"}:
        report.add("top-level", where, f"{key!r} belongs into properties")
    batch.add(feature.get("geometry"), where, report)
    properties = feature.get("properties")
    if not isinstance(properties, dict):
        report.add("properties", where, repr(properties))
        return
    _check_properties(properties, where, report)
    if "nucleusGeometry" in feature:
        if properties.get("objectType") != "cell":
            report.add("nucleus", where, "only cells have a nucleus")
        batch.add(feature["nucleusGeometry"], f"{where} nucleus", report)


def _check_properties(properties: dict[str, Any], where: str, report: Report) -> None:
    kind = properties.get("objectType", "annotation")
    report.object_types[str(kind)] += 1
    if kind not in OBJECT_TYPES:
        report.add("object-type", where, repr(kind))
    if "type" in properties:
        report.add("properties-type", where)
    if "nucleusGeometry" in properties:
        report.add("nucleus", where, "nucleusGeometry belongs to the feature")
    if "name" in properties and not (isinstance(properties["name"], str) and properties["name"]):
        report.add("name", where, repr(properties["name"]))
    if "isLocked" in properties and not isinstance(properties["isLocked"], bool):
        report.add("locked", where, repr(properties["isLocked"]))
    if "color" in properties and not _is_color(properties["color"]):
        report.add("color", where, repr(properties["color"]))
    if "classification" in properties:
        _check_classification(properties["classification"], where, report)
    _check_map(properties.get("measurements", {}), where, report, rule="measurements")
    _check_map(properties.get("metadata", {}), where, report, rule="metadata")


def _check_classification(given: Any, where: str, report: Report) -> None:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given["name"].strip():
        report.add("classification", where, repr(given))
        return
    report.classes[given["name"]] += 1
    if not _is_color(given.get("color")):
        report.add("color", where, repr(given.get("color")))


def _is_color(given: Any) -> bool:
    return isinstance(given, list) and len(given) == 3 and all(type(c) is int and 0 <= c <= 255 for c in given)


def _check_map(given: Any, where: str, report: Report, *, rule: str) -> None:
    def fits(value: Any) -> bool:
        if rule == "metadata":
            return isinstance(value, str)
        return type(value) in (int, float) and math.isfinite(value)

    if not isinstance(given, dict):
        report.add(rule, where, repr(given))
        return
    for name, value in given.items():
        if not name or not fits(value):
            report.add(rule, where, f"{name!r}: {value!r}")


# ---------------------------------------------------------------- geometry


class _Geometries:
    """Polygons of some features, checked together."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self._clear()

    def _clear(self) -> None:
        self.owners: list[str] = []  # one per polygon
        self.rings: list[list[Any]] = []
        self.ring_owner: list[int] = []

    def add(self, geometry: Any, where: str, report: Report) -> None:
        if not isinstance(geometry, dict) or geometry.get("type") not in GEOMETRY_TYPES:
            report.add("geometry", where, str(geometry)[:80])
            return
        coordinates, kind = geometry.get("coordinates"), geometry["type"]
        if not isinstance(coordinates, list) or not coordinates:
            report.add("geometry", where, "no coordinates")
        elif kind in {"Polygon", "MultiPolygon"}:
            for polygon in [coordinates] if kind == "Polygon" else coordinates:
                self._add_polygon(polygon, where, report)
            if kind == "MultiPolygon":
                _check_together(geometry, where, report)

    def _add_polygon(self, polygon: Any, where: str, report: Report) -> None:
        if not isinstance(polygon, list) or not polygon or not all(map(_may_be_ring, polygon)):
            report.add("ring", where, "not rings of at least four [x, y]")
            return
        if any(ring[0] != ring[-1] for ring in polygon):
            report.add("closed", where)
            return
        for ring in polygon:
            self.rings.append(ring)
            self.ring_owner.append(len(self.owners))
        self.owners.append(where)

    def check(self, report: Report) -> None:
        """Check and forget what was added."""
        if self.owners and not self._regular():
            self._leave_out_irregular(report)
        if self.owners:
            self._check(report)
        self._clear()

    def _regular(self) -> bool:
        """Quickly: every point of every ring is two numbers."""
        points = [point for ring in self.rings for point in ring]
        try:
            kinds = {type(value) for point in points for value in point}
            return kinds <= {int, float} and set(map(len, points)) == {2}
        except TypeError:
            return False

    def _leave_out_irregular(self, report: Report) -> None:
        bad = {owner for ring, owner in zip(self.rings, self.ring_owner, strict=True) if not all(map(_is_point, ring))}
        for owner in sorted(bad):
            report.add("ring", self.owners[owner], "not rings of at least four [x, y]")
        rings = [(r, o) for r, o in zip(self.rings, self.ring_owner, strict=True) if o not in bad]
        number = {owner: k for k, owner in enumerate(o for o in range(len(self.owners)) if o not in bad)}
        self.owners = [name for owner, name in enumerate(self.owners) if owner not in bad]
        self.rings, self.ring_owner = [ring for ring, _ in rings], [number[owner] for _, owner in rings]

    def _check(self, report: Report) -> None:
        lengths = np.array([len(ring) for ring in self.rings])
        given = np.array([point for ring in self.rings for point in ring], np.float64)
        point_owner = np.repeat(self.ring_owner, lengths)
        self._say(report, "number", point_owner[~np.isfinite(given).all(axis=1)])
        coords = np.nan_to_num(given)
        rounded = np.round(coords, 2)
        self._say(report, "decimals", point_owner[(rounded != coords).any(axis=1)])
        if self.size is not None:
            outside = (coords < 0).any(axis=1) | (coords > self.size).any(axis=1)
            self._say(report, "outside", point_owner[outside])
        rings = shapely.linearrings(rounded, indices=np.repeat(np.arange(len(lengths)), lengths))
        owners = np.array(self.ring_owner)
        exterior = np.concatenate([[True], owners[1:] != owners[:-1]])
        self._say(report, "orientation", owners[shapely.is_ccw(rings) != exterior])
        polygons = shapely.polygons(rings, indices=owners)
        for index in np.flatnonzero(~shapely.is_valid(polygons)):
            report.add("valid", self.owners[index], shapely.is_valid_reason(polygons[index]))
        self._say(report, "sliver", np.flatnonzero(shapely.area(polygons) < SLIVER))

    def _say(self, report: Report, rule: str, owners: np.ndarray) -> None:
        for index in np.unique(owners):
            report.add(rule, self.owners[index])


def _check_together(geometry: dict[str, Any], where: str, report: Report) -> None:
    """The parts of a MultiPolygon must not overlap."""
    try:
        whole = shapely.set_precision(shapely.from_geojson(json.dumps(geometry)), 0.01, mode="pointwise")
    except (shapely.GEOSException, ValueError, TypeError):
        return  # said of its rings
    if not shapely.is_valid(whole) and shapely.is_valid(shapely.get_parts(whole)).all():
        report.add("valid", where, shapely.is_valid_reason(whole))


def _may_be_ring(ring: Any) -> bool:
    return isinstance(ring, list) and len(ring) >= 4


def _is_point(point: Any) -> bool:
    return type(point) is list and len(point) == 2 and type(point[0]) in _NUMBERS and type(point[1]) in _NUMBERS


_NUMBERS = (int, float)
