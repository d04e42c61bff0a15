"""Annotation files -> polygons in level-0 px -> masks.

Read: GeoJSON as QuPath writes and accepts it (FeatureCollection, array of Features, one Feature, a bare geometry)
and ASAP XML, plain, gzipped or zipped. What a file is, is decided by its bytes, not by its name.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, shape
from skimage.draw import polygon as fill_polygon

from wsi_mmm.errors import AnnotationError
from wsi_mmm.types import F64, Mask

MAX_BYTES = 4 << 30
"""Unpacked size above which a compressed file is refused rather than filling the memory."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A valid polygon with area, in level-0 px, and the name of its class (None when it has none)."""

    geometry: Polygon | MultiPolygon
    class_name: str | None = None


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a file holds: its polygons in file order, how many objects were no polygon, how many had to be repaired."""

    items: tuple[Shape, ...]
    skipped: int = 0
    repaired: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Shape]:
        return iter(self.items)


def load_shapes(path: str | Path) -> Shapes:
    """The polygons of a local annotation file; for other URIs fetch the bytes and call ``parse_shapes``.

    Raises AnnotationError naming the file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    return parse_shapes(data, str(path))


def parse_shapes(data: bytes, name: str) -> Shapes:
    """The polygons in the bytes of an annotation file; ``name`` is what errors call it.

    Invalid polygons are repaired (``shapely.make_valid``, polygon parts only); points, lines and polygons without
    area are skipped and counted. Raises AnnotationError.
    """
    data = _unpack(data, name).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data:
        raise AnnotationError(f"{name}: the file is empty: export the annotations again")
    found = _xml_shapes(data, name) if data.startswith(b"<") else _geojson_shapes(data, name)
    items, skipped, repaired = [], 0, 0
    for geometry, class_name in found:
        valid = _polygons(geometry)
        if valid is None:
            skipped += 1
            continue
        repaired += valid is not geometry
        items.append(Shape(valid, class_name))
    return Shapes(tuple(items), skipped, repaired)


def rasterise(shapes: Shapes, size: tuple[int, int], *, scale_x: float, scale_y: float) -> Mask:
    """A mask bool[height, width] of ``size`` (height, width) px of ``scale`` level-0 px, True where a shape is.

    A pixel is set when its centre is inside a shape or an outline passes through it, so no shape vanishes.
    """
    mask = np.zeros(size, bool)
    for item in shapes:
        scaled = shapely.transform(item.geometry, lambda xy: xy / (scale_x, scale_y))
        for part in shapely.get_parts(scaled):
            _fill(mask, part)
    return mask


def _fill(mask: Mask, polygon: Polygon) -> None:
    x0, y0, x1, y1 = (math.floor(side) for side in polygon.bounds)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1 + 1, mask.shape[1]), min(y1 + 1, mask.shape[0])
    if x1 <= x0 or y1 <= y0:
        return
    window = mask[y0:y1, x0:x1]
    inside = np.zeros(window.shape, bool)
    # Pixel k is centred at k + 0.5 in these coordinates, and at k for skimage.
    inside[_interior(polygon.exterior, x0, y0, window.shape)] = True
    for hole in polygon.interiors:
        inside[_interior(hole, x0, y0, window.shape)] = False
    window |= inside
    edge = shapely.get_coordinates(shapely.segmentize(polygon.boundary, 0.5)) - (x0, y0)
    x, y = np.floor(edge).astype(np.int64).T
    keep = (x >= 0) & (y >= 0) & (x < window.shape[1]) & (y < window.shape[0])
    window[y[keep], x[keep]] = True


def _interior(ring: Any, x0: int, y0: int, size: tuple[int, int]) -> tuple[Any, ...]:
    xy: F64 = shapely.get_coordinates(ring) - (x0 + 0.5, y0 + 0.5)
    return tuple(fill_polygon(xy[:, 1], xy[:, 0], size))  # type: ignore[no-untyped-call]


def _polygons(geometry: Any) -> Polygon | MultiPolygon | None:
    """``geometry`` itself when it is a valid polygon with area, its repaired polygon parts, or None."""
    if geometry is None or geometry.geom_type not in ("Polygon", "MultiPolygon") or geometry.is_empty:
        return None
    if geometry.is_valid:
        return geometry if geometry.area > 0 else None
    parts = shapely.get_parts(shapely.make_valid(geometry, method="structure", keep_collapsed=False))
    parts = [part for whole in parts for part in shapely.get_parts(whole)]
    kept = [part for part in parts if part.geom_type == "Polygon" and part.area > 0]
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else MultiPolygon(kept)


def _unpack(data: bytes, name: str) -> bytes:
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as stream:
                return _bounded(stream.read(MAX_BYTES + 1), name)
        if data.startswith(b"PK\x03\x04"):
            return _unzip(data, name)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise AnnotationError(f"{name}: the compressed file is damaged ({error}): export or copy it again") from error
    return data


def _unzip(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [m for m in archive.namelist() if m.lower().endswith((".geojson", ".json", ".xml"))]
        members = [m for m in members if not m.startswith("__MACOSX")]
        if len(members) != 1:
            raise AnnotationError(f"{name}: the zip holds {len(members)} .geojson, .json or .xml files: pack one")
        with archive.open(members[0]) as stream:
            return _bounded(stream.read(MAX_BYTES + 1), name)


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise AnnotationError(f"{name}: unpacks to more than {MAX_BYTES >> 30} GiB: split it")
    return data


def _geojson_shapes(data: bytes, name: str) -> Iterator[tuple[Any, str | None]]:
    """(geometry or None, class name) of each feature."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{name}: neither GeoJSON nor XML ({error}): export it as GeoJSON") from error
    for number, feature in enumerate(_features(root, name)):
        if not isinstance(feature, dict):
            raise AnnotationError(f"{name}: feature {number} is no object: export the annotations as GeoJSON")
        geometry = feature.get("geometry") if feature.get("type") == "Feature" else feature
        yield _geometry(geometry, f"{name}: feature {number}"), _class_name(feature.get("properties"))


def _features(root: Any, name: str) -> list[Any]:
    if isinstance(root, list):
        return root
    kind = root.get("type") if isinstance(root, dict) else None
    if kind == "FeatureCollection":
        features = root.get("features")
        if isinstance(features, list):
            return features
    elif kind == "GeometryCollection" and isinstance(root.get("geometries"), list):
        return list(root["geometries"])
    elif kind in ("Feature", "Polygon", "MultiPolygon"):
        return [root]
    raise AnnotationError(f"{name}: JSON, but no FeatureCollection, Feature or array of Features: export it as GeoJSON")


def _geometry(geometry: Any, where: str) -> Any:
    """A shapely geometry, or None for what is no polygon (points, lines, rings of fewer than three points)."""
    if geometry is None or (isinstance(geometry, dict) and geometry.get("type") not in ("Polygon", "MultiPolygon")):
        return None
    try:
        if _degenerate(geometry):
            return None
        with np.errstate(invalid="ignore"):  # not finite: said below
            made = shape(geometry)
        finite = bool(np.isfinite(shapely.get_coordinates(made)).all())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, shapely.errors.ShapelyError) as error:
        raise AnnotationError(f"{where} has coordinates of no polygon ({error}): correct or remove it") from error
    if not finite:
        raise AnnotationError(f"{where} has a coordinate that is not a finite number: correct or remove it")
    return made


def _degenerate(geometry: Any) -> bool:
    """Whether the exterior of a Polygon has fewer than three points: what one click in a viewer leaves behind."""
    coordinates = geometry["coordinates"]
    if geometry["type"] != "Polygon" or not isinstance(coordinates, list):
        return False
    return len(coordinates) == 0 or len(coordinates[0]) < 3


def _class_name(properties: Any) -> str | None:
    """``properties.classification`` as QuPath writes it (an object with name or names) or as a plain string."""
    label = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(label, dict):
        names = label.get("names")
        label = ": ".join(map(str, names)) if isinstance(names, list) and "name" not in label else label.get("name")
    return label if isinstance(label, str) else None


def _xml_shapes(data: bytes, name: str) -> Iterator[tuple[Any, str | None]]:
    """(geometry or None, group) of each annotation of an ASAP file."""
    if b"<!ENTITY" in data:
        raise AnnotationError(f"{name}: XML with entity declarations is refused: export the annotations again")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:  # LookupError: an encoding that nobody knows
        raise AnnotationError(f"{name}: XML that cannot be parsed ({error}): export the annotations again") from error
    if root.tag != "ASAP_Annotations":
        raise AnnotationError(f"{name}: XML, but not of ASAP (<{root.tag}>): convert it to GeoJSON")
    for number, annotation in enumerate(root.iter("Annotation")):
        group = annotation.get("PartOfGroup")
        yield _asap_polygon(annotation, f"{name}: annotation {number}"), None if group in (None, "None") else group


def _asap_polygon(annotation: ET.Element, where: str) -> Polygon | None:
    if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
        return None
    try:
        nodes = sorted(annotation.iter("Coordinate"), key=lambda node: int(float(node.attrib["Order"])))
        points = [(float(node.attrib["X"]), float(node.attrib["Y"])) for node in nodes]
    except (KeyError, ValueError) as error:
        raise AnnotationError(f"{where} has a coordinate without Order, X or Y: correct or remove it") from error
    if not all(math.isfinite(value) for point in points for value in point):
        raise AnnotationError(f"{where} has a coordinate that is not a finite number: correct or remove it")
    return Polygon(points) if len(points) >= 3 else None
