"""The records that an app posts: frozen, they keep every rule of the platform, and their JSON bodies.

A record that exists is one that the platform's schemas accept; OutputError names the rule that was broken. Coordinates
are whole level-0 px; `empaia.geometry` makes them from objects. ``npp``: nanometres per px.
"""

from __future__ import annotations

import json
import math
import operator
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from wsi_mmm.empaia.pixelmaps import Pixelmap, pixelmap_body
from wsi_mmm.empaia.rules import checked_id, checked_name, checked_text
from wsi_mmm.errors import OutputError

ItemType = Literal[
    "point", "polygon", "rectangle", "circle", "class", "integer", "float", "bool", "string", "collection"
]
Ring = tuple[tuple[int, int], ...]
_CLASS_VALUE, _STRING_VALUE = 100, 200  # longest that the platform keeps, characters


@dataclass(frozen=True, slots=True)
class Wsi:
    """A slide of the platform: its id, its size in level-0 px and its resolution (nm per level-0 px)."""

    id: str
    width: int
    height: int
    npp: float

    def __post_init__(self) -> None:
        checked_id(self.id)
        if min(self.width, self.height) < 1:
            raise OutputError(f"slide {self.id} has no pixels: {self.width} x {self.height}")
        _check_positive(self.npp, "the resolution of a slide")


@dataclass(frozen=True, slots=True)
class Point:
    """Level-0 px (x, y), inside the slide."""

    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Polygon:
    """At least three corners (x, y); not closed (the first corner is not repeated), no holes."""

    corners: Ring


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Upper left corner and size, level-0 px."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Circle:
    """Centre and radius, level-0 px. The centre lies on the slide; the circle may reach beyond."""

    x: int
    y: int
    radius: int


AnnotationShape = Point | Polygon | Rectangle | Circle


@dataclass(frozen=True, slots=True)
class Annotation:
    """A shape on a slide. ``npp_created``: at which resolution it was found; ``npp_viewing``: where to show it."""

    name: str
    shape: AnnotationShape
    wsi: Wsi
    npp_created: float
    npp_viewing: tuple[float, float] | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        checked_name(self.name)
        checked_text(self.description)
        _check_positive(self.npp_created, "npp_created")
        for value in self.npp_viewing or ():
            _check_positive(value, "npp_viewing")
        _check_shape(self.shape, self.wsi)


@dataclass(frozen=True, slots=True)
class ClassOf:
    """The class of an annotation that was posted: a value of the EAD, ``org.empaia.<vendor>.<app>.v3.0.classes...``."""

    value: str
    annotation_id: str

    def __post_init__(self) -> None:
        checked_text(self.value, _CLASS_VALUE)
        if not _is_uuid(self.annotation_id):
            raise OutputError(f"a class refers to {self.annotation_id!r}, which is no id of an annotation")


@dataclass(frozen=True, slots=True)
class Reference:
    """The annotation, collection or slide that a primitive or a collection is about."""

    type: Literal["annotation", "collection", "wsi"]
    id: str

    def __post_init__(self) -> None:
        checked_id(self.id)


@dataclass(frozen=True, slots=True)
class Primitive:
    """One value with a name. ``type`` says how it is sent: a ``float`` of value 2 is sent as 2.0."""

    name: str
    type: Literal["integer", "float", "bool", "string"]
    value: int | float | str
    reference: Reference | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        checked_name(self.name)
        checked_text(self.description)
        _primitive_value(self)


@dataclass(frozen=True, slots=True)
class Collection:
    """Items of one type. Large ones are posted empty and filled afterwards. A reference is a slide or an annotation."""

    item_type: ItemType
    items: tuple[Record, ...] = ()
    name: str | None = None
    reference: Reference | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            checked_name(self.name)
        checked_text(self.description)
        if self.reference is not None and self.reference.type == "collection":
            raise OutputError("a collection cannot refer to a collection; give a slide or an annotation")
        for item in self.items:
            if type_of(item) != self.item_type:
                raise OutputError(f"a collection of {self.item_type} cannot hold a {type_of(item)}")


Record = Annotation | ClassOf | Primitive | Collection | Pixelmap


def type_of(record: Record) -> str:
    """The platform's name for what ``record`` is."""
    match record:
        case Annotation():
            return type(record.shape).__name__.lower()
        case ClassOf():
            return "class"
        case Collection():
            return "collection"
        case Primitive():
            return record.type
        case Pixelmap():
            return f"{record.kind}_pixelmap"


def body(record: Record, job_id: str) -> dict[str, object]:
    """The JSON object of ``record``, made by job ``job_id``; fields that say nothing are left out."""
    match record:
        case Annotation():
            fields = _annotation_fields(record)
        case ClassOf():
            fields = {"value": record.value, "reference_id": record.annotation_id, "reference_type": "annotation"}
        case Primitive():
            fields = {"name": record.name, "value": _primitive_value(record), **_reference_fields(record.reference)}
            fields["description"] = record.description
        case Collection():
            items = [body(item, job_id) for item in record.items]
            fields = {"item_type": record.item_type, "name": record.name, "items": items}
            fields |= {**_reference_fields(record.reference), "description": record.description}
        case Pixelmap():
            fields = pixelmap_body(record)
    given = {key: value for key, value in fields.items() if value is not None}
    return {"type": type_of(record), **given, "creator_id": checked_id(job_id), "creator_type": "job"}


def encoded(value: Mapping[str, object]) -> bytes:
    """``value`` as JSON without spaces. OutputError for NaN, infinity and text that is not Unicode."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise OutputError(f"what was found cannot be sent as JSON: {error}") from error


# ------------------------------------------------------------------------------------------------ fields


def _annotation_fields(record: Annotation) -> dict[str, object]:
    viewing = record.npp_viewing
    return {
        "name": record.name,
        "description": record.description,
        **_shape_fields(record.shape),
        "npp_created": float(record.npp_created),
        "npp_viewing": None if viewing is None else sorted(float(value) for value in viewing),
        "reference_id": record.wsi.id,
        "reference_type": "wsi",
    }


def _shape_fields(shape: AnnotationShape) -> dict[str, object]:
    match shape:
        case Point(x, y):
            return {"coordinates": [int(x), int(y)]}
        case Polygon(corners):
            return {"coordinates": [[int(x), int(y)] for x, y in corners]}
        case Rectangle(x, y, width, height):
            return {"upper_left": [int(x), int(y)], "width": int(width), "height": int(height)}
        case Circle(x, y, radius):
            return {"center": [int(x), int(y)], "radius": int(radius)}


def _reference_fields(reference: Reference | None) -> dict[str, str]:
    return {} if reference is None else {"reference_id": reference.id, "reference_type": reference.type}


def _primitive_value(record: Primitive) -> int | float | str:
    value = record.value
    match record.type:
        case "integer":
            return _whole_number(value)
        case "float" if not isinstance(value, str | bool) and math.isfinite(value):
            return float(value)
        case "bool" if isinstance(value, bool):
            return value
        case "string" if isinstance(value, str):
            checked_text(value, _STRING_VALUE)
            return value
    raise OutputError(f"'{record.name}' cannot be sent: {value!r} is no {record.type}")


# ------------------------------------------------------------------------------------------------ rules


def _whole_number(value: object) -> int:
    """``value`` as int; OutputError for what is not a whole number by type (19.0 is not)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # whatever is no integer raises TypeError
    except TypeError as error:
        raise OutputError(f"{value!r} is no whole number") from error


def _check_positive(value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise OutputError(f"{what} must be a finite number of nm per px above zero, not {value}")


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def _check_shape(shape: AnnotationShape, wsi: Wsi) -> None:
    """Outlines may touch the slide's right and lower edge (width, height); points and centres are pixels inside it."""
    match shape:
        case Point(x, y):
            _check_within(x, y, wsi, edge=0)
        case Circle(x, y, radius):
            _check_within(x, y, wsi, edge=0)
            _check_size(radius)
        case Rectangle(x, y, width, height):
            _check_within(x, y, wsi, edge=0)
            _check_size(width, height)
            _check_within(x + width, y + height, wsi, edge=1)
        case Polygon(corners):
            if len(corners) < 3 or corners[0] == corners[-1]:
                raise OutputError("a polygon needs three corners at least, the first not repeated at the end")
            for x, y in corners:
                _check_within(x, y, wsi, edge=1)


def _check_within(x: int, y: int, wsi: Wsi, *, edge: int) -> None:
    if not (0 <= _whole_number(x) < wsi.width + edge and 0 <= _whole_number(y) < wsi.height + edge):
        raise OutputError(f"({x}, {y}) lies outside the slide of {wsi.width} x {wsi.height} px; clip it first")


def _check_size(*sizes: int) -> None:
    if min(map(_whole_number, sizes)) < 1:
        raise OutputError("a rectangle or circle needs a size of one pixel at least")
