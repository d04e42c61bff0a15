"""GeoJSON -> objects, as QuPath writes and accepts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import geojson
import numpy as np
import shapely
from shapely.geometry import Polygon, shape

from wsi_mmm.annotations.repair import join_parts
from wsi_mmm.annotations.shapes import FoundObject
from wsi_mmm.errors import AnnotationError
from wsi_mmm.storage.limits import MAX_OBJECTS, parse_json

_ALONE = ("Feature", "Polygon", "MultiPolygon", "Point", "MultiPoint", "LineString", "MultiLineString")


def read_geojson(data: bytes, name: str, values: Sequence[str]) -> list[FoundObject]:
    """Every feature of a GeoJSON file, those of nested collections too. Raises AnnotationError."""
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
        properties = feature.get("properties")
        class_name, numbers = _class_name(properties), tuple(_read_number(properties, key) for key in values)
        own = _object_name(properties)
        if number in made:
            found.append(FoundObject(made[number], (), class_name, numbers, name=own))
        elif isinstance(geometry, dict) and geometry.get("type") == "GeometryCollection":
            polygon, dots, unused = _read_collection(geometry, f"{name}: feature {number}")
            found.append(FoundObject(polygon, dots, class_name, numbers, unused, own))
        else:
            polygon = _read_geometry(geometry, f"{name}: feature {number}")
            found.append(FoundObject(polygon, _finite_points(geometry), class_name, numbers, name=own))
    return found


def _read_collection(geometry: Any, where: str) -> tuple[Any, tuple[tuple[float, float], ...], int]:
    """The polygons of a GeometryCollection as one geometry (None: it has none), its points, and how many other members
    stand beside a polygon."""
    leaves, waiting = [], [geometry]
    while waiting:
        one = waiting.pop()
        members = one.get("geometries") if isinstance(one, dict) and one.get("type") == "GeometryCollection" else None
        if isinstance(members, list):
            waiting += reversed(members)
        else:
            leaves.append(one)
    polygons = [polygon for leaf in leaves if (polygon := _read_geometry(leaf, where)) is not None]
    parts = [part for polygon in polygons for part in shapely.get_parts(polygon).tolist()]
    dots = tuple(chain.from_iterable(map(_finite_points, leaves)))
    return join_parts(parts), dots, len(leaves) - len(polygons) if polygons else 0


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
    """The features and bare geometries of a file, in its sequence, those of collections in collections too."""
    listed = _listed_features(root)
    if listed is None:
        raise AnnotationError(
            f"{name}: JSON, but no FeatureCollection, Feature or array of Features: export it as GeoJSON"
        )
    if all(_listed_features(one, nested=True) is None for one in listed):
        return listed
    flat, waiting = [], listed[::-1]
    while waiting:
        one = waiting.pop()
        members = _listed_features(one, nested=True)
        if members is None:
            flat.append(one)
        else:
            waiting += reversed(members)
    return flat


def _listed_features(value: Any, *, nested: bool = False) -> list[Any] | None:
    """The members of a FeatureCollection or array, at the top also of what stands alone; None for anything else."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "FeatureCollection":
        return value["features"] if isinstance(value.get("features"), list) else None
    if isinstance(value, list) or nested:
        return value if isinstance(value, list) else None
    if kind == "GeometryCollection" and isinstance(value.get("geometries"), list):
        return list(value["geometries"])
    return [value] if kind in _ALONE else None


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


def _object_name(properties: Any) -> str | None:
    """``properties.name``, as QuPath writes the name of an object."""
    name = properties.get("name") if isinstance(properties, dict) else None
    return name if isinstance(name, str) and name else None
