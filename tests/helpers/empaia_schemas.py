"""The platform's own schemas, as judges of what is posted. Each has the name of its file."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator, Draft202012Validator

SCHEMAS = Path(__file__).parents[1] / "empaia" / "schemas"
ITEM_MODELS = {
    "point": "PostPointAnnotation",
    "polygon": "PostPolygonAnnotation",
    "rectangle": "PostRectangleAnnotation",
    "circle": "PostCircleAnnotation",
    "line": "PostLineAnnotation",
    "arrow": "PostArrowAnnotation",
    "class": "PostClass",
    "integer": "PostIntegerPrimitive",
    "float": "PostFloatPrimitive",
    "bool": "PostBoolPrimitive",
    "string": "PostStringPrimitive",
    "continuous_pixelmap": "PostContinuousPixelmap",
    "discrete_pixelmap": "PostDiscretePixelmap",
    "nominal_pixelmap": "PostNominalPixelmap",
}


def model_problems(name: str, value: Any) -> list[str]:
    """What the model ``name`` (such as "PostAnnotation") has against ``value``; empty when it accepts it."""
    return [error.message[:300] for error in _model(name, None).iter_errors(value)]


def item_problems(item: Any) -> list[str]:
    """What the model of an object's own ``type`` has against it: quicker than trying every model.

    Stricter than JSON schema where the models are: 19.0 is no integer. Items of collections are judged one by one.
    """
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "collection":
        empty = {**item, "items": []}
        inner = [text for one in item.get("items", []) for text in item_problems(one)]
        return [*model_problems("PostCollectionApps", empty), *inner, *_whole(empty)]
    if kind not in ITEM_MODELS:
        return [f"no object of the platform is a {kind!r}"]
    return [error.message[:300] for error in _model("PostItemListApps", ITEM_MODELS[kind]).iter_errors(item)] + _whole(
        item
    )


def ead_problems(ead: Any) -> list[str]:
    """What the published schema of EADs has against ``ead``."""
    return [f"{list(error.path)}: {error.message[:300]}" for error in _ead().iter_errors(ead)]


def _whole(item: Any) -> list[str]:
    places = ("coordinates", "center", "radius", "upper_left", "width", "height", "centroid")
    return [f"{place} holds a float" for place in places if "." in json.dumps(item.get(place))]


@functools.cache
def _model(name: str, part: str | None) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"empaia_v3_{name}.schema.json").read_text(encoding="utf-8"))
    if part is not None:
        schema = {"$defs": schema["$defs"], "$ref": f"#/$defs/{part}"}
    return Draft202012Validator(schema)


@functools.cache
def _ead() -> Draft7Validator:
    return Draft7Validator(json.loads((SCHEMAS / "ead-schema.v3.json").read_text(encoding="utf-8")))
