"""XML of viewers -> objects: ASAP, Aperio ImageScope and HALO. Their coordinates are px of level 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import shapely
from shapely.geometry import Polygon

from wsi_mmm.annotations.repair import check_crossings, join_parts, polygon_parts, repair_polygons, thin_outlines
from wsi_mmm.annotations.shapes import FoundObject
from wsi_mmm.errors import AnnotationError

MAX_ELEMENTS = 1 << 24
"""Elements of an XML file: each costs half a kilobyte of memory."""

ELLIPSE_CORNERS = 128
"""Corners of the polygon that stands for an ellipse: its area is right to 0.04 %."""

_DRAWN = ("0", "1", "2", "polygon", "freehand", "rectangle", "ellipse")
"""Types of regions with an area, as ImageScope numbers and HALO names them; arrows, rulers and text have none."""


def read_xml(data: bytes, name: str) -> list[FoundObject]:
    """Every annotation of an XML file. Raises AnnotationError, which names the formats that are read."""
    if b"<!ENTITY" in data:
        raise AnnotationError(f"{name}: XML with entity declarations is refused: export the annotations again")
    if data.count(b"<") > 2 * MAX_ELEMENTS:
        raise AnnotationError(f"{name}: more than {MAX_ELEMENTS:,} XML elements: split it, or export it as GeoJSON")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:  # LookupError: an encoding that nobody knows
        raise AnnotationError(f"{name}: XML that cannot be parsed ({error}): export the annotations again") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    if root.tag == "ASAP_Annotations":
        return [_asap_object(one, f"{name}: annotation {n}") for n, one in enumerate(root.iter("Annotation"))]
    if root.tag == "Annotations":
        return _layered_objects(root, name)
    raise AnnotationError(
        f"{name}: XML, but not of ASAP, ImageScope or HALO (<{root.tag}>): export as one of these, or as GeoJSON"
    )


# ---------------------------------------------------------------- ASAP


def _asap_object(annotation: ET.Element, where: str) -> FoundObject:
    group, kind = annotation.get("PartOfGroup"), annotation.get("Type")
    group = None if group == "None" else group
    drawn = kind in ("Polygon", "Spline", "Rectangle")
    points = _asap_points(annotation, where) if drawn or kind in ("Dot", "PointSet") else []
    polygon = Polygon(points) if drawn and len(points) >= 3 else None
    return FoundObject(polygon, () if drawn else tuple(points), group, name=annotation.get("Name") or None)


def _asap_points(annotation: ET.Element, where: str) -> list[tuple[float, float]]:
    try:
        nodes = sorted(annotation.iter("Coordinate"), key=lambda node: int(float(node.attrib["Order"])))
    except (KeyError, OverflowError, ValueError) as error:
        raise AnnotationError(f"{where} has a coordinate without Order, X or Y: correct or remove it") from error
    return _read_points(nodes, where)


def _read_points(nodes: Sequence[ET.Element], where: str) -> list[tuple[float, float]]:
    """The coordinates of elements with the attributes X and Y."""
    try:
        points = [(float(node.attrib["X"]), float(node.attrib["Y"])) for node in nodes]
    except (KeyError, ValueError) as error:
        raise AnnotationError(f"{where} has a coordinate without X or Y: correct or remove it") from error
    if not all(math.isfinite(value) for point in points for value in point):
        raise AnnotationError(f"{where} has a coordinate that is not a finite number: correct or remove it")
    return points


# ---------------------------------------------------------------- ImageScope, HALO


def _layered_objects(root: ET.Element, name: str) -> list[FoundObject]:
    """The regions of all layers; the class of a region is its layer. Regions that are marked as negative are holes in
    those of their layer."""
    found: list[FoundObject] = []
    layers: list[int] = []
    holes: dict[int, list[Polygon]] = {}
    for layer, annotation in enumerate(root.iter("Annotation")):
        class_name = _layer_name(annotation)
        for number, region in enumerate(annotation.iter("Region")):
            where = f"{name}: region {number} of layer {layer}"
            nodes = [node for tag in ("Vertex", "V") for node in region.iter(tag)]
            kind, points = region.get("Type", "0").strip().lower(), _read_points(nodes, where)
            polygon = _region_outline(kind, points)
            if region.get("NegativeROA", "0").strip().lower() in ("1", "true"):
                holes.setdefault(layer, []).extend([polygon] if polygon is not None else [])
            else:
                found.append(FoundObject(polygon, tuple(points) if kind == "pin" else (), class_name))
                layers.append(layer)
    return list(_cut_holes(found, layers, holes, name)) if holes else found


def _layer_name(annotation: ET.Element) -> str | None:
    """The name of a layer, its description where it has none, or its colour as #rrggbb."""
    attributes = annotation.iterfind("Attributes/Attribute")
    texts = [annotation.get("Name", "")]
    texts += [one.get("Value", "") for one in attributes if one.get("Name", "").lower() == "description"]
    if name := next((text.strip() for text in texts if text.strip()), ""):
        return name
    try:
        colour = int(annotation.get("LineColor", ""))
    except ValueError:
        return None
    return f"#{colour & 255:02x}{colour >> 8 & 255:02x}{colour >> 16 & 255:02x}"


def _region_outline(kind: str, points: Sequence[tuple[float, float]]) -> Polygon | None:
    """The polygon of a region; rectangles and ellipses may be given by two corners. None for what has no area."""
    if kind not in _DRAWN or len(points) < 2:
        return None
    xy = np.array(points)
    (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)
    if kind in ("2", "ellipse") and len(points) <= 4:
        angles = np.arange(ELLIPSE_CORNERS) * (2 * math.pi / ELLIPSE_CORNERS)
        return Polygon(
            np.stack([x0 + x1 + (x1 - x0) * np.cos(angles), y0 + y1 + (y1 - y0) * np.sin(angles)], axis=1) / 2
        )
    if kind in ("1", "rectangle") and len(points) == 2:
        return Polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return Polygon(points) if len(points) >= 3 else None


def _cut_holes(
    found: Sequence[FoundObject], layers: Sequence[int], holes: dict[int, list[Polygon]], name: str
) -> Iterator[FoundObject]:
    """The objects with the holes of their layers; an object that lies in a hole is an island, and stays."""
    flat: list[Any] = [one.polygon for one in found] + [hole for some in holes.values() for hole in some]
    made, _ = repair_polygons(thin_outlines(np.array(flat, object), name), name)
    negative, begin = {}, len(found)
    for layer, some in holes.items():
        negative[layer] = np.array([one for one in made[begin : begin + len(some)] if one is not None], object)
        begin += len(some)
    check_crossings(made, name)
    trees = {layer: shapely.STRtree(some) for layer, some in negative.items()}
    for one, layer, polygon in zip(found, layers, made[: len(found)], strict=True):
        if polygon is None or layer not in trees:
            yield FoundObject(polygon, one.dots, one.class_name)
            continue
        near = negative[layer][trees[layer].query(polygon, predicate="intersects")]
        cutting = near[~shapely.covers(near, polygon)]
        left = shapely.difference(polygon, shapely.union_all(cutting)) if len(cutting) else polygon
        yield FoundObject(join_parts(polygon_parts(left)), one.dots, one.class_name)
