"""Every body is one that the platform's own schemas accept; what they would refuse is refused before it is sent."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from helpers.empaia_records import ANNOTATIONS, CLASS, JOB, NOTE, PIXELMAPS, POSTS, PRIMITIVES, WSI
from helpers.empaia_schemas import item_problems, model_problems
from wsi_mmm.empaia import bodies
from wsi_mmm.empaia.bodies import (
    Annotation,
    Circle,
    ClassOf,
    Collection,
    Point,
    Polygon,
    Primitive,
    Rectangle,
    Reference,
)
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap, tile_bytes, tile_length
from wsi_mmm.errors import OutputError


@pytest.mark.parametrize(
    ("model", "record"),
    POSTS,
)
def test_bodies_are_accepted(model: str, record: bodies.Record) -> None:
    """Each record's body is valid for the platform's model of it, says who made it, and survives JSON unchanged."""
    body = bodies.body(record, JOB)
    assert json.loads(bodies.encoded(body)) == body
    assert model_problems(model, body) == [] == item_problems(body)
    assert (body["creator_id"], body["creator_type"]) == (JOB, "job")


@pytest.mark.parametrize("record", [*ANNOTATIONS[:2], PRIMITIVES[0], ClassOf(CLASS, NOTE)])
def test_lists_of_items_are_accepted(record: bodies.Record) -> None:
    """The body of a post to a collection is valid for the platform's model of item lists."""
    assert model_problems("PostItemListApps", {"items": [bodies.body(record, JOB)] * 2}) == []


def test_a_float_is_sent_as_a_float() -> None:
    """A density of 2 becomes 2.0 and a pixelmap's limits of floats stay floats: the platform is strict about types."""
    assert b'"value":2.0' in bodies.encoded(bodies.body(PRIMITIVES[1], JOB))
    assert b'"max_value":1.0' in bodies.encoded(bodies.body(PIXELMAPS[0], JOB))


REFUSED: dict[str, Any] = {
    "a float coordinate": lambda: Annotation("a", Point(1.0, 2), WSI, 499.0),  # type: ignore[arg-type]
    "a truth value as coordinate": lambda: Annotation("a", Point(True, 2), WSI, 499.0),
    "a point left of the slide": lambda: Annotation("a", Point(-1, 2), WSI, 499.0),
    "a point on the slide's far edge": lambda: Annotation("a", Point(1000, 2), WSI, 499.0),
    "a corner beyond the slide": lambda: Annotation("a", Polygon(((0, 0), (1001, 0), (5, 5))), WSI, 499.0),
    "a polygon of two corners": lambda: Annotation("a", Polygon(((0, 0), (1, 1))), WSI, 499.0),
    "a closed polygon": lambda: Annotation("a", Polygon(((0, 0), (9, 0), (9, 9), (0, 0))), WSI, 499.0),
    "a rectangle without width": lambda: Annotation("a", Rectangle(0, 0, 0, 5), WSI, 499.0),
    "a rectangle beyond the slide": lambda: Annotation("a", Rectangle(1, 0, 1000, 5), WSI, 499.0),
    "a circle without radius": lambda: Annotation("a", Circle(1, 1, 0), WSI, 499.0),
    "no name": lambda: Annotation("", Point(1, 2), WSI, 499.0),
    "a blank name": lambda: Annotation("  ", Point(1, 2), WSI, 499.0),
    "a long name": lambda: Annotation("a" * 201, Point(1, 2), WSI, 499.0),
    "a long description": lambda: Annotation("a", Point(1, 2), WSI, 499.0, description="d" * 1001),
    "no resolution": lambda: Annotation("a", Point(1, 2), WSI, 0.0),
    "a resolution that is NaN": lambda: Annotation("a", Point(1, 2), WSI, math.nan),
    "a slide without pixels": lambda: bodies.Wsi("x", 0, 5, 499.0),
    "a slide with a long id": lambda: bodies.Wsi("x" * 51, 5, 5, 499.0),
    "a class of a long value": lambda: ClassOf("c" * 101, NOTE),
    "a class of no annotation": lambda: ClassOf(CLASS, "nucleus 1"),
    "a NaN": lambda: Primitive("p", "float", math.nan),
    "an infinity": lambda: Primitive("p", "float", math.inf),
    "a float as integer": lambda: Primitive("p", "integer", 2.0),
    "a truth value as integer": lambda: Primitive("p", "integer", True),
    "a truth value as float": lambda: Primitive("p", "float", True),
    "a number as truth value": lambda: Primitive("p", "bool", 1),
    "an empty string": lambda: Primitive("p", "string", ""),
    "a long string": lambda: Primitive("p", "string", "s" * 201),
    "a collection of a collection": lambda: Collection("point", reference=Reference("collection", NOTE)),
    "an item of another type": lambda: Collection("polygon", (ANNOTATIONS[0],)),
    "limits the wrong way round": lambda: Pixelmap("p", "discrete", "uint8", "w", (MapLevel(0),), limits=(5, 5)),
    "limits its elements cannot hold": lambda: Pixelmap("p", "discrete", "uint8", "w", (MapLevel(0),), limits=(0, 256)),
    "a continuous map of integers": lambda: Pixelmap("p", "continuous", "uint8", "w", (MapLevel(0),), limits=(0, 1)),
    "a nominal map without classes": lambda: Pixelmap("p", "nominal", "uint8", "w", (MapLevel(0),)),
    "a map without levels": lambda: Pixelmap("p", "discrete", "uint8", "w", (), limits=(0, 9)),
    "a level twice": lambda: Pixelmap("p", "discrete", "uint8", "w", (MapLevel(0), MapLevel(0)), limits=(0, 9)),
    "small tiles": lambda: Pixelmap("p", "discrete", "uint8", "w", (MapLevel(0),), limits=(0, 9), side=128),
    "a neutral NaN": lambda: Pixelmap(
        "p", "continuous", "float32", "w", (MapLevel(0),), limits=(0, 1), neutral=math.nan
    ),
    "a tile range from 5 to 3": lambda: MapLevel(0, (5, 0, 3, 0)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_breaks_a_rule_is_no_record(what: str) -> None:
    """A record that the platform would refuse cannot be made: OutputError."""
    with pytest.raises(OutputError):
        REFUSED[what]()


def test_no_nan_gets_into_json() -> None:
    """NaN never becomes the text NaN, which is no JSON."""
    with pytest.raises(OutputError, match="JSON"):
        bodies.encoded({"value": math.nan})


def test_tiles_have_the_bytes_the_description_promises() -> None:
    """An edge tile is padded with the neutral value, little-endian, and as long as the description says."""
    heat, count, _ = PIXELMAPS
    data = tile_bytes(heat, np.full((10, 20), 0.5))
    assert len(data) == tile_length(heat) == 256 * 256 * 4
    back = np.frombuffer(data, "<f4").reshape(256, 256)
    assert (back[:10, :20] == 0.5).all() and back.sum() == 100.0
    assert tile_bytes(count, np.array([[1, 258]]))[:4] == b"\x01\x00\x02\x01"


@pytest.mark.parametrize("values", [[[math.nan]], [[1.5]], [[-1]], [[1001]], np.zeros((257, 1)), np.zeros((2, 1, 1))])
def test_tiles_of_wrong_values_are_refused(values: Any) -> None:
    """Values that are not finite, not whole, beyond the limits or too many are an OutputError."""
    with pytest.raises(OutputError):
        tile_bytes(PIXELMAPS[1], np.asarray(values))
