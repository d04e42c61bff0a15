"""Annotation files -> polygons and points in level-0 px -> masks.

Read: GeoJSON as QuPath writes and accepts it (FeatureCollection, array of Features, one Feature, a bare geometry)
and ASAP XML, plain, gzipped or zipped. What a file is, is decided by its bytes, not by its name.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from xml.etree import ElementTree as ET

import geojson
import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon, shape
from skimage.draw import polygon as fill_polygon

from wsi_mmm.errors import AnnotationError, PluginError
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.storage.limits import MAX_OBJECTS, parse_json, unpack_file
from wsi_mmm.types import F64, I64, Mask

MAX_COORDINATE = 1 << 31
"""Level-0 px beyond which no object lies: slides have at most 2^24 on a side."""

_ENDINGS = (".geojson", ".json", ".xml")


@dataclass(frozen=True, slots=True)
class Shape:
    """A valid polygon with area, in level-0 px, the name of its class (None when it has none), and the numbers that
    were asked for by name, NaN where the object has no such number."""

    geometry: Polygon | MultiPolygon
    class_name: str | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Dot:
    """A point at level-0 px (x, y); the rest as of a `Shape`."""

    x: float
    y: float
    class_name: str | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Shapes:
    """The contents of a file: its polygons in file order, the number of objects that were no polygon (``skipped``), of
    polygons that had to be repaired, and the points among the objects that were none."""

    items: tuple[Shape, ...]
    skipped: int = 0
    repaired: int = 0
    dots: tuple[Dot, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Shape]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class _Found:
    """An object as it stands in a file: its polygon (None: it has none), its points (x, y), and what it says."""

    polygon: Any
    dots: tuple[tuple[float, float], ...] = ()
    class_name: str | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AnnotationFormat:
    """A file format that an installed package offers under the entry points ``wsi_mmm.annotations``.

    ``recognises(name, data)`` says whether the unpacked bytes of a file are of this format; ``parse(data, name,
    values)`` gives its shapes, with the numbers named ``values``, and raises AnnotationError. Coordinates are level-0
    px."""

    recognises: Callable[[str, bytes], bool]
    parse: Callable[[bytes, str, Sequence[str]], Shapes]


def annotation_format(name: str) -> AnnotationFormat:
    """Return the format that an installed package offers as ``name``. PluginError when it is none."""
    plugin = load_plugin("annotations", name)
    if not isinstance(plugin, AnnotationFormat):
        raise PluginError(f"the annotation format {name!r} of a plug-in is no wsi_mmm.annotations.AnnotationFormat")
    return plugin


def find_format(name: str, data: bytes) -> AnnotationFormat | None:
    """Return the format of a plug-in that recognises the bytes of a file, or None."""
    formats = map(annotation_format, plugin_names("annotations"))
    return next((known for known in formats if known.recognises(name, data)), None)


def parse_shapes(data: bytes, name: str, values: Sequence[str] = ()) -> Shapes:
    """The polygons in the bytes of an annotation file; ``name`` is what errors call it, ``values`` names numbers of
    the objects (GeoJSON properties or QuPath measurements) to be kept.

    Invalid polygons are repaired (``shapely.make_valid``, polygon parts only); points, lines and polygons without
    area are skipped and counted. Raises AnnotationError.
    """
    data = unpack_file(data, name, _ENDINGS, AnnotationError).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data:
        raise AnnotationError(f"{name}: the file is empty: export the annotations again")
    if plugin := find_format(name, data):
        return plugin.parse(data, name, values)
    with _pause_collection():
        found = _xml_objects(data, name) if data.startswith(b"<") else _geojson_objects(data, name, values)
        return _collect_shapes(found, name)


@contextmanager
def _pause_collection() -> Iterator[None]:
    """Pause garbage collection, then leave it as it was: searching millions of lists in use is half of parsing.

    200,000 polygons of 12 corners: 8.1 s of CPU, 19.2 s with collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _collect_shapes(found: Sequence[_Found], name: str) -> Shapes:
    """Valid polygons, points, and what had to be left out."""
    polygons = np.array([one.polygon for one in found], object)
    _check_extent(polygons, found, name)
    fine = shapely.is_valid(polygons) & (shapely.area(polygons) > 0)
    items, dots, skipped, repaired = [], [], 0, 0
    for one, good in zip(found, fine.tolist(), strict=True):
        dots += [Dot(x, y, one.class_name, one.values) for x, y in one.dots]
        valid = one.polygon if good else _repair_polygon(one.polygon)
        if valid is None:
            skipped += 1
            continue
        repaired += valid is not one.polygon
        items.append(Shape(valid, one.class_name, one.values))
    return Shapes(tuple(items), skipped, repaired, tuple(dots))


def _check_extent(polygons: Any, found: Sequence[_Found], name: str) -> None:
    """AnnotationError for what lies where no slide is: drawing it would take memory without bound."""
    reach = np.abs(shapely.bounds(polygons)).max(axis=1, initial=0.0)  # NaN for what is no polygon
    far = np.flatnonzero(reach > MAX_COORDINATE).tolist()
    far += [n for n, one in enumerate(found) if one.dots and np.abs(one.dots).max() > MAX_COORDINATE]
    if far:
        raise AnnotationError(f"{name}: object {min(far)} lies beyond {MAX_COORDINATE} px: correct or remove it")


def shape_at(shapes: Shapes, points: F64) -> I64:
    """int64[n]: number of the first shape that holds each of ``points`` float64[n, 2] (x, y level-0 px); -1: none."""
    found = np.full(len(points), len(shapes), np.int64)
    tree = shapely.STRtree([item.geometry for item in shapes])
    asked, number = tree.query(shapely.points(points), predicate="intersects")
    np.minimum.at(found, asked, number)
    return np.where(found < len(shapes), found, -1)


def rasterise(shapes: Shapes, size: tuple[int, int], *, scale_x: float, scale_y: float) -> Mask:
    """A mask bool[height, width] of ``size`` (height, width) px of ``scale`` level-0 px, True where a shape is.

    A pixel is set when its centre is inside a shape or an outline passes through it, so no shape vanishes.
    """
    mask = np.zeros(size, bool)
    for item in shapes:
        scaled = shapely.transform(item.geometry, lambda xy: xy / (scale_x, scale_y))
        for part in shapely.get_parts(scaled):
            _fill_polygon(mask, part)
    return mask


def _fill_polygon(mask: Mask, polygon: Polygon) -> None:
    x0, y0, x1, y1 = (math.floor(side) for side in polygon.bounds)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1 + 1, mask.shape[1]), min(y1 + 1, mask.shape[0])
    if x1 <= x0 or y1 <= y0:
        return
    window = mask[y0:y1, x0:x1]
    inside = np.zeros(window.shape, bool)
    for ring, covers in ((polygon.exterior, True), *((hole, False) for hole in polygon.interiors)):
        # Pixel k is centred at k + 0.5 in these coordinates, and at k for skimage.
        xy: F64 = shapely.get_coordinates(ring) - (x0 + 0.5, y0 + 0.5)
        inside[tuple(fill_polygon(xy[:, 1], xy[:, 0], window.shape))] = covers  # type: ignore[no-untyped-call]
    window |= inside
    near = shapely.clip_by_rect(polygon.boundary, x0, y0, x1, y1)  # what lies outside takes no memory
    edge = shapely.get_coordinates(shapely.segmentize(near, 0.5)) - (x0, y0)
    x, y = np.floor(edge).astype(np.int64).T
    keep = (x >= 0) & (y >= 0) & (x < window.shape[1]) & (y < window.shape[0])
    window[y[keep], x[keep]] = True


def _repair_polygon(geometry: Any) -> Polygon | MultiPolygon | None:
    """The polygon parts with area that are left of an invalid geometry, or None."""
    if geometry is None or geometry.geom_type not in ("Polygon", "MultiPolygon"):
        return None
    parts = shapely.get_parts(shapely.make_valid(geometry, method="structure", keep_collapsed=False))
    kept = [part for part in shapely.get_parts(parts) if part.geom_type == "Polygon" and part.area > 0]
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else MultiPolygon(kept)


def _geojson_objects(data: bytes, name: str, values: Sequence[str]) -> list[_Found]:
    """Every feature of a GeoJSON."""
    features = _feature_list(parse_json(data, name, AnnotationError, "neither GeoJSON nor XML"), name)
    if len(features) > MAX_OBJECTS:
        raise AnnotationError(f"{name}: more than {MAX_OBJECTS:,} objects: split it")
    for number, feature in enumerate(features):
        if not isinstance(feature, dict):
            raise AnnotationError(f"{name}: feature {number} is no object: export the annotations as GeoJSON")
    geometries = [one.get("geometry") if one.get("type") == "Feature" else one for one in features]
    made = _plain_polygons(geometries)
    found = []
    for number, (feature, geometry) in enumerate(zip(features, geometries, strict=True)):
        polygon = made[number] if number in made else _read_geometry(geometry, f"{name}: feature {number}")
        properties = feature.get("properties")
        numbers = tuple(_read_number(properties, key) for key in values)
        found.append(_Found(polygon, _finite_points(geometry), _class_name(properties), numbers))
    return found


def _plain_polygons(geometries: Sequence[Any]) -> dict[int, Polygon]:
    """Number -> polygon of those of one ring, made together. Empty when one of them is odd: then each is looked at by
    itself, and the odd one named."""
    plain = {n: ring for n, geometry in enumerate(geometries) if (ring := _one_ring(geometry)) is not None}
    try:
        xy = np.array(list(chain.from_iterable(plain.values())))
        if xy.dtype.kind not in "if" or xy.shape[1:] != (2,) or not np.isfinite(xy).all():
            return {}
        owner = np.repeat(np.arange(len(plain)), [len(ring) for ring in plain.values()])
        made = shapely.polygons(shapely.linearrings(xy.astype(np.float64), indices=owner))
    except (OverflowError, ValueError, TypeError, shapely.errors.ShapelyError):
        return {}
    return dict(zip(plain, made.tolist(), strict=True))


def _one_ring(geometry: Any) -> list[Any] | None:
    """The exterior of a Polygon of four points or more that has no holes."""
    if not isinstance(geometry, dict) or geometry.get("type") != "Polygon":
        return None
    rings = geometry.get("coordinates")
    if not isinstance(rings, list) or len(rings) != 1 or not isinstance(rings[0], list) or len(rings[0]) < 4:
        return None
    return rings[0]


def _finite_points(geometry: Any) -> tuple[tuple[float, float], ...]:
    """The points of a Point or MultiPoint that have two finite numbers; others are skipped."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Point", "MultiPoint"):
        return ()
    found = geometry.get("coordinates")
    points = [found] if kind == "Point" else found if isinstance(found, list) else []
    pairs = [(_to_float(one[0]), _to_float(one[1])) for one in points if isinstance(one, list) and len(one) >= 2]
    return tuple(pair for pair in pairs if all(map(math.isfinite, pair)))


def _read_number(properties: Any, key: str) -> float:
    """A property of that name, or a measurement (an object, or QuPath's older list of name and value); else NaN."""
    if not isinstance(properties, dict):
        return math.nan
    if key in properties:
        return _to_float(properties[key])
    measurements = properties.get("measurements")
    if isinstance(measurements, list):
        measurements = {one.get("name"): one.get("value") for one in measurements if isinstance(one, dict)}
    return _to_float(measurements.get(key)) if isinstance(measurements, dict) else math.nan


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _feature_list(root: Any, name: str) -> list[Any]:
    if isinstance(root, list):
        return root
    kind = root.get("type") if isinstance(root, dict) else None
    if kind == "FeatureCollection":
        features = root.get("features")
        if isinstance(features, list):
            return features
    elif kind == "GeometryCollection" and isinstance(root.get("geometries"), list):
        return list(root["geometries"])
    elif kind in ("Feature", "Polygon", "MultiPolygon", "Point", "MultiPoint"):
        return [root]
    raise AnnotationError(f"{name}: JSON, but no FeatureCollection, Feature or array of Features: export it as GeoJSON")


def _read_geometry(geometry: Any, where: str) -> Any:
    """A shapely geometry, or None for what is no polygon (points, lines, rings of fewer than three points)."""
    if geometry is None or (isinstance(geometry, dict) and geometry.get("type") not in ("Polygon", "MultiPolygon")):
        return None
    try:
        if _is_degenerate(geometry):
            return None
        with np.errstate(invalid="ignore"):  # not finite: said below
            made = shape(geometry)
        finite = bool(np.isfinite(shapely.get_coordinates(made)).all())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, shapely.errors.ShapelyError) as error:
        broken = _broken_rule(geometry) or error
        raise AnnotationError(f"{where} has coordinates of no polygon ({broken}): correct or remove it") from error
    if not finite:
        raise AnnotationError(f"{where} has a coordinate that is not a finite number: correct or remove it")
    return made


def _broken_rule(geometry: Any) -> str:
    """The rule of GeoJSON that a Polygon or MultiPolygon breaks, as the geojson library puts it; "": none."""
    try:
        made = getattr(geojson, geometry["type"])(geometry["coordinates"])
        return str(made.errors() or "")[:200]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return str(error)[:200]


def _is_degenerate(geometry: Any) -> bool:
    """True if the exterior of a Polygon has fewer than three points: what one click in a viewer leaves behind."""
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


def _xml_objects(data: bytes, name: str) -> list[_Found]:
    """Every annotation of an ASAP file; its class is its group."""
    if b"<!ENTITY" in data:
        raise AnnotationError(f"{name}: XML with entity declarations is refused: export the annotations again")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:  # LookupError: an encoding that nobody knows
        raise AnnotationError(f"{name}: XML that cannot be parsed ({error}): export the annotations again") from error
    if root.tag != "ASAP_Annotations":
        raise AnnotationError(f"{name}: XML, but not of ASAP (<{root.tag}>): convert it to GeoJSON")
    return [_asap_object(annotation, f"{name}: annotation {n}") for n, annotation in enumerate(root.iter("Annotation"))]


def _asap_object(annotation: ET.Element, where: str) -> _Found:
    group, kind = annotation.get("PartOfGroup"), annotation.get("Type")
    group = None if group == "None" else group
    drawn = kind in ("Polygon", "Spline", "Rectangle")
    points = _asap_points(annotation, where) if drawn or kind in ("Dot", "PointSet") else []
    return _Found(Polygon(points) if drawn and len(points) >= 3 else None, () if drawn else tuple(points), group)


def _asap_points(annotation: ET.Element, where: str) -> list[tuple[float, float]]:
    try:
        nodes = sorted(annotation.iter("Coordinate"), key=lambda node: int(float(node.attrib["Order"])))
        points = [(float(node.attrib["X"]), float(node.attrib["Y"])) for node in nodes]
    except (KeyError, OverflowError, ValueError) as error:
        raise AnnotationError(f"{where} has a coordinate without Order, X or Y: correct or remove it") from error
    if not all(math.isfinite(value) for point in points for value in point):
        raise AnnotationError(f"{where} has a coordinate that is not a finite number: correct or remove it")
    return points


def ring_arrays(geometries: Sequence[Any]) -> tuple[F64, I64, I64, F64]:
    """The closed rings of n polygons, by polygon: points float64[m, 2], where rings begin and end int64[r + 1], whose
    they are int64[r]; and the polygons' areas float64[n]."""
    whole = np.array(geometries, object)
    parts, owner = shapely.get_parts(whole, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    ends = np.cumsum(np.bincount(ring, minlength=len(rings)), dtype=np.int64)
    return xy, np.concatenate([np.zeros(1, np.int64), ends]), owner[part].astype(np.int64), shapely.area(whole)


def box_index(boxes: F64) -> Callable[[F64], tuple[I64, I64]]:
    """An index of boxes float64[n, 4] (x0, y0, x1, y1): asked with k boxes, it gives the pairs (numbers of the asked
    one, of the box) that touch, by asked one. Threads may share it."""
    tree = shapely.STRtree(shapely.linestrings(boxes.reshape(-1, 2, 2)))  # a diagonal has the extent of its box
    tree.query(shapely.box(0, 0, 1, 1))  # what is built with the first question is built by now

    def touching(asked: F64) -> tuple[I64, I64]:
        pairs = tree.query(shapely.box(*asked.T)).astype(np.int64)
        return pairs[0], pairs[1]

    return touching
