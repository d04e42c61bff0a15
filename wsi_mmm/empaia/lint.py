"""What is wrong with an EAD beyond its schema: the rules between its parts, also those that the official validator,
as of `empaia-app-test-suite` 3.7.0, does not check:

- classes of a pixelmap's elements must exist;
- postprocessing needs preprocessing;
- what an input or output refers to must be in the same mode;
- outputs may not restrict their classes, those inside collections neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GLOBAL = "org.empaia.global.v1"
_ANNOTATIONS = frozenset({"point", "line", "arrow", "rectangle", "polygon", "circle"})
_PRIMITIVES = frozenset({"bool", "integer", "float", "string"})
_PIXELMAPS = frozenset({"continuous_pixelmap", "discrete_pixelmap", "nominal_pixelmap"})
_VALUE = 100  # longest class value, characters

Ead = Mapping[str, Any]
Place = tuple[str, Mapping[str, Any]]


def problems(ead: Ead) -> list[str]:
    """One line per broken rule, in the order of the EAD; empty for a sound one. Its schema must hold already."""
    return [*_references(ead), *_class_values(ead), *_modes(ead), *_shared(ead)]


def _places(key: str, value: Mapping[str, Any]) -> Iterator[Place]:
    """An input or output and what lies in it: ("tissue", ...), ("tissue.items", ...)."""
    yield key, value
    if value.get("type") == "collection":
        yield from _places(f"{key}.items", value["items"])


def _all(ead: Ead) -> dict[str, Mapping[str, Any]]:
    return dict(place for key, value in ead["io"].items() for place in _places(key, value))


def _targets(kind: str) -> frozenset[str]:
    """What something of ``kind`` may refer to."""
    if kind in _ANNOTATIONS or kind in _PIXELMAPS:
        return frozenset({"wsi"})
    if kind == "class":
        return _ANNOTATIONS
    return _ANNOTATIONS | ({"wsi", "collection"} if kind in _PRIMITIVES else {"wsi"})


def _references(ead: Ead) -> Iterator[str]:
    places = _all(ead)
    for key, value in places.items():
        reference = value.get("reference")
        if reference is None:
            continue
        found = places.get(str(reference).removeprefix("io."))
        if found is None:
            yield f"{key} refers to {reference}, which there is not"
        elif found["type"] not in _targets(value["type"]):
            yield f"{key} is a {value['type']} and cannot refer to a {found['type']}"


def _values(tree: Mapping[str, Any], base: str) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value.get("name"), str):
            yield f"{base}.{key}"
        else:
            yield from _values(value, f"{base}.{key}")


def _class_values(ead: Ead) -> Iterator[str]:
    own = set(_values(ead.get("classes", {}), f"{ead['namespace']}.classes"))
    known = own | {f"{GLOBAL}.classes.roi"}
    for value in sorted(own):
        if len(value) > _VALUE:
            yield f"class {value} is longer than {_VALUE} characters"
    for where, value in _used(ead):
        if value not in known:
            yield f"{where} names the class {value}, which there is not"


def _used(ead: Ead) -> Iterator[tuple[str, str]]:
    for key, value in _all(ead).items():
        for field in ("classes", "channel_classes", "element_classes"):
            yield from ((key, one) for one in value.get(field, ()))
    for part, rules in ead.get("rendering", {}).items():
        yield from ((f"rendering.{part}", rule["class_value"]) for rule in rules)


def _modes(ead: Ead) -> Iterator[str]:
    modes = ead["modes"]
    if not {"standalone", "preprocessing", "report"} & set(modes):
        yield "it needs the mode standalone, preprocessing or report"
    if "postprocessing" in modes and "preprocessing" not in modes:
        yield "postprocessing needs preprocessing"
    for name, mode in modes.items():
        yield from _mode(ead, name, mode)
    used = {key for mode in modes.values() for key in (*mode["inputs"], *mode["outputs"])}
    yield from (f"{key} is in no mode" for key in ead["io"] if key not in used)


def _mode(ead: Ead, name: str, mode: Mapping[str, Any]) -> Iterator[str]:
    inputs, outputs = mode["inputs"], mode["outputs"]
    containerized = mode.get("containerized")
    if name in ("standalone", "preprocessing") and containerized is False:
        yield f"{name} runs a container"
    if name == "report" and containerized:
        yield "report runs no container"
    if name == "postprocessing" and containerized is None:
        yield "postprocessing must say whether it is containerized"
    if name == "preprocessing" and [ead["io"].get(key, {}).get("type") for key in inputs] != ["wsi"]:
        yield "preprocessing has one input, a wsi"
    yield from (f"{name} has {key} as input and as output" for key in inputs if key in outputs)
    for key in (*inputs, *outputs):
        if key in ead["io"]:
            yield from _in_mode(ead, name, key)
        else:
            yield f"{name} names {key}, which there is not"


def _in_mode(ead: Ead, name: str, key: str) -> Iterator[str]:
    mode = ead["modes"][name]
    is_input = key in mode["inputs"]
    for place, value in _places(key, ead["io"][key]):
        target = str(value.get("reference", f"io.{key}")).removeprefix("io.").split(".")[0]
        if target not in (*mode["inputs"], *mode["outputs"]):
            yield f"in {name}, {place} refers to io.{target}, which is not in that mode"
        elif is_input and target not in mode["inputs"]:
            yield f"in {name}, the input {place} refers to the output io.{target}"


def _shared(ead: Ead) -> Iterator[str]:
    """Outputs that restrict classes; an output of one mode that is an input of another may."""
    modes = ead["modes"].values()
    inputs = {key for mode in modes for key in mode["inputs"]}
    outputs = {key for mode in modes for key in mode["outputs"]}
    for key in sorted((outputs - inputs) & set(ead["io"])):
        for place, value in _places(key, ead["io"][key]):
            if "classes" in value:
                yield f"{place} is an output and may not restrict its classes"
