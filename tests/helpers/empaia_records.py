"""Records of every kind that an app posts, with the platform's model of their post."""

from __future__ import annotations

import numpy as np

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
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap

JOB = "00000000-0000-4000-8000-00000000000a"
WSI = bodies.Wsi("b10648a7-340d-43fc-a2d9-4d91cc86f33f", 1000, 800, 499.0)
NOTE = "11111111-1111-4111-8111-111111111111"
CLASS = "org.empaia.wsi_mmm.default.v3.0.classes.nuclei.nucleus"

SHAPES = [
    Point(999, 799),
    Polygon(((0, 0), (1000, 0), (1000, 800))),
    Rectangle(0, 0, 1000, 800),
    Circle(5, 6, 7),
]
ANNOTATIONS = [
    *(Annotation("a", shape, WSI, 499.0) for shape in SHAPES),
    Annotation("a" * 200, Point(np.int64(3), np.int32(4)), WSI, 250, npp_viewing=(7984.0, 499.0), description="d"),
]
PRIMITIVES = [
    Primitive("count", "integer", np.int64(42), Reference("wsi", WSI.id)),
    Primitive("density", "float", 2, Reference("collection", NOTE)),
    Primitive("seen", "bool", True),
    Primitive("stain", "string", "H&E", Reference("annotation", NOTE), description="most tiles"),
]
PIXELMAPS = [
    Pixelmap("heat", "continuous", "float32", WSI.id, (MapLevel(0, (0, 0, 3, 2)),), limits=(0, 1), neutral=0,
             channel_classes=((0, CLASS),)),
    Pixelmap("count", "discrete", "uint16", WSI.id, (MapLevel(2),), limits=(0, 1000), neutral=0),
    Pixelmap("seg", "nominal", "uint8", WSI.id, (MapLevel(1),), neutral=0, element_classes=((1, CLASS),), side=512),
]  # fmt: skip
POSTS: list[tuple[str, bodies.Record]] = [
    *(("PostAnnotation", record) for record in ANNOTATIONS),
    *(("PostPrimitive", record) for record in PRIMITIVES),
    *(("PostPixelmap", record) for record in PIXELMAPS),
    ("PostClass", ClassOf(CLASS, NOTE)),
    ("PostCollectionApps", Collection("polygon", name="tissue", reference=Reference("wsi", WSI.id))),
    ("PostCollectionApps", Collection("point", (ANNOTATIONS[0],))),
    ("PostCollectionApps", Collection("collection", (Collection("float", (PRIMITIVES[1],)),))),
]
