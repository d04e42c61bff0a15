"""The EAD of an app, and its rules beyond the schema: those between its parts, also those that the official
validator, as of `empaia-app-test-suite` 3.7.0, does not check:

- classes of a pixelmap's elements must exist;
- postprocessing needs preprocessing;
- what an input or output refers to must be in the same mode;
- outputs may not restrict their classes, those inside collections neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypedDict

GLOBAL = "org.empaia.global.v1"
_ANNOTATIONS = frozenset({"point", "line", "arrow", "rectangle", "polygon", "circle"})
_PRIMITIVES = frozenset({"bool", "integer", "float", "string"})
_PIXELMAPS = frozenset({"continuous_pixelmap", "discrete_pixelmap", "nominal_pixelmap"})
_LONGEST_VALUE = 100  # longest class value, characters

ClassTree: TypeAlias = "Mapping[str, str | ClassTree]"
"""Classes by their keys, grouped; a leaf is ``{"name": its name}``."""


class IoType(TypedDict, total=False):
    """An input, an output, or what a collection holds."""

    type: str
    items: IoType
    reference: str
    description: str
    classes: list[str]
    channel_classes: list[str]
    element_classes: list[str]


class ModeType(TypedDict, total=False):
    """Keys of ``io`` that a mode reads and writes."""

    inputs: list[str]
    outputs: list[str]
    containerized: bool


Ead = TypedDict(
    "Ead",
    {
        "$schema": str,
        "name": str,
        "name_short": str,
        "namespace": str,
        "description": str,
        "io": dict[str, IoType],
        "classes": ClassTree,
        "rendering": dict[str, list[dict[str, str]]],
        "permissions": dict[str, bool],
        "modes": dict[str, ModeType],
    },
    total=False,
)
"""The JSON of ``ead.json``."""

NamedIo = tuple[str, IoType]


def problems(ead: Ead) -> list[str]:
    """One line per broken rule, in the order of the EAD; empty for a sound one. Its schema must hold already."""
    return [*_reference_problems(ead), *_class_problems(ead), *_mode_problems(ead), *_restricted_outputs(ead)]


def _walk_io(key: str, value: IoType) -> Iterator[NamedIo]:
    """An input or output and what lies in it: ("tissue", ...), ("tissue.items", ...)."""
    yield key, value
    if value.get("type") == "collection":
        yield from _walk_io(f"{key}.items", value["items"])


def _all_io(ead: Ead) -> dict[str, IoType]:
    return dict(place for key, value in ead["io"].items() for place in _walk_io(key, value))


def _allowed_references(kind: str) -> frozenset[str]:
    """The types that something of ``kind`` may refer to."""
    if kind in _ANNOTATIONS or kind in _PIXELMAPS:
        return frozenset({"wsi"})
    if kind == "class":
        return _ANNOTATIONS
    return _ANNOTATIONS | ({"wsi", "collection"} if kind in _PRIMITIVES else {"wsi"})


def _reference_problems(ead: Ead) -> Iterator[str]:
    places = _all_io(ead)
    for key, value in places.items():
        reference = value.get("reference")
        if reference is None:
            continue
        found = places.get(str(reference).removeprefix("io."))
        if found is None:
            yield f"{key} refers to {reference}, which there is not"
        elif found["type"] not in _allowed_references(value["type"]):
            yield f"{key} is a {value['type']} and cannot refer to a {found['type']}"


def class_leaves(tree: ClassTree, base: str) -> Iterator[str]:
    """The names of all classes of a tree whose own name is ``base``."""
    for key, value in tree.items():
        if isinstance(value, str):
            continue
        if isinstance(value.get("name"), str):
            yield f"{base}.{key}"
        else:
            yield from class_leaves(value, f"{base}.{key}")


def _class_problems(ead: Ead) -> Iterator[str]:
    own = set(class_leaves(ead.get("classes", {}), f"{ead['namespace']}.classes"))
    known = own | {f"{GLOBAL}.classes.roi"}
    for value in sorted(own):
        if len(value) > _LONGEST_VALUE:
            yield f"class {value} is longer than {_LONGEST_VALUE} characters"
    for where, value in _used_classes(ead):
        if value not in known:
            yield f"{where} names the class {value}, which there is not"


def _used_classes(ead: Ead) -> Iterator[tuple[str, str]]:
    for key, value in _all_io(ead).items():
        named = value.get("classes", []), value.get("channel_classes", []), value.get("element_classes", [])
        yield from ((key, one) for some in named for one in some)
    for part, rules in ead.get("rendering", {}).items():
        yield from ((f"rendering.{part}", rule["class_value"]) for rule in rules)


def _mode_problems(ead: Ead) -> Iterator[str]:
    modes = ead["modes"]
    if not {"standalone", "preprocessing", "report"} & set(modes):
        yield "it needs the mode standalone, preprocessing or report"
    if "postprocessing" in modes and "preprocessing" not in modes:
        yield "postprocessing needs preprocessing"
    for name, mode in modes.items():
        yield from _problems_of_mode(ead, name, mode)
    used = {key for mode in modes.values() for key in (*mode["inputs"], *mode["outputs"])}
    yield from (f"{key} is in no mode" for key in ead["io"] if key not in used)


def _problems_of_mode(ead: Ead, name: str, mode: ModeType) -> Iterator[str]:
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
    for place, value in _walk_io(key, ead["io"][key]):
        target = str(value.get("reference", f"io.{key}")).removeprefix("io.").split(".")[0]
        if target not in (*mode["inputs"], *mode["outputs"]):
            yield f"in {name}, {place} refers to io.{target}, which is not in that mode"
        elif is_input and target not in mode["inputs"]:
            yield f"in {name}, the input {place} refers to the output io.{target}"


def _restricted_outputs(ead: Ead) -> Iterator[str]:
    """Outputs that restrict classes; an output of one mode that is an input of another may."""
    modes = ead["modes"].values()
    inputs = {key for mode in modes for key in mode["inputs"]}
    outputs = {key for mode in modes for key in mode["outputs"]}
    for key in sorted((outputs - inputs) & set(ead["io"])):
        for place, value in _walk_io(key, ead["io"][key]):
            if "classes" in value:
                yield f"{place} is an output and may not restrict its classes"
