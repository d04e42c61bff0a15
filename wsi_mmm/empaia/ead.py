"""The EAD: the inputs and outputs of an app, written from its model's card.

Inputs: ``slide`` and, in standalone mode, ``regions`` (regions of interest, of one kind of shape). Outputs, by task:

=====================  ==============================================================================================
all                    ``tissue``: polygons
instances, detect      ``T_objects``, their ``T_classes`` and ``T_confidences``; ``T_counts`` and ``T_densities`` (per
                       mm2) of each region or, in preprocessing, ``T_slide_count`` and ``T_slide_density``; ``T_map``
segment, multisegment  ``T_objects`` and ``T_classes``
classify               ``T_classes``: one per tissue polygon; ``T_slide_class``: of the whole slide, as text
regress, survive       ``T_slide_value``
multilabel             ``T_slide_values``: one per class
=====================  ==============================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from wsi_mmm.empaia.lint import GLOBAL, ClassTree, Ead, IoType, problems
from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import ModelCard, TaskCard
from wsi_mmm.storage import store

RegionKind = Literal["rectangle", "polygon", "circle"]
SCHEMA = "https://gitlab.com/empaia/integration/definitions/-/raw/main/ead/ead-schema.v3.json"

Io = dict[str, IoType]


def ead(card: ModelCard, *, vendor: str = "wsi_mmm", regions: RegionKind = "rectangle") -> Ead:
    """The description of ``card`` as an app. ModelError when a name cannot be one of the platform."""
    namespace = f"org.empaia.{slug(vendor)}.{slug(card.name)}.v3.0"
    outputs = [_task_outputs(task) for task in card.tasks]
    slide: Io = {"slide": {"type": "wsi"}}
    regions_type: IoType = {"type": regions, "reference": "io.slide", "classes": [f"{GLOBAL}.classes.roi"]}
    rois: Io = {"regions": {"type": "collection", "items": regions_type}}
    tissue: Io = {"tissue": _collection_type("polygon", "io.slide", about="io.slide")}
    both = _join_outputs([tissue, *(common for common, _, _ in outputs)])
    alone, whole = _join_outputs([one for _, one, _ in outputs]), _join_outputs([one for _, _, one in outputs])
    made: Ead = {
        "$schema": SCHEMA,
        "name": _fit_name(f"wsi_mmm {card.name}", 30),
        "name_short": _fit_name(card.name, 10),
        "namespace": namespace,
        "description": _describe_app(card),
        "io": _join_outputs([slide, rois, both, alone, whole]),
        "classes": _class_tree(card),
        "rendering": {"annotations": list(_rendering_rules(card, namespace))},
        "permissions": {"data_transmission_to_external_service_provider": False, "wsi_raw_file_access": False},
        "modes": {
            "standalone": {"inputs": ["slide", "regions"], "outputs": [*both, *alone]},
            "preprocessing": {"inputs": ["slide"], "outputs": [*both, *whole]},
        },
    }
    wrong = problems(made)
    if wrong:
        raise ModelError(f"model '{card.name}' cannot be an EMPAIA app: {wrong[0]}")
    return made


def ead_json(made: Ead) -> str:
    """The text of ``ead.json``."""
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def write_ead(text: str, folder: Path) -> Path:
    """Write ``ead.json`` to ``folder``, which is made: its path. OutputError when that cannot be."""
    path = folder / "ead.json"
    store.write_bytes(str(path), text.encode())
    return path


def class_values(card: ModelCard, task: TaskCard, *, vendor: str = "wsi_mmm") -> tuple[str, ...]:
    """The platform's names of a task's classes, in the card's order."""
    base = f"org.empaia.{slug(vendor)}.{slug(card.name)}.v3.0.classes.{slug(task.name)}"
    return tuple(f"{base}.{leaf}" for leaf in _leaf_keys(task))


def slug(text: str) -> str:
    """``text`` with the characters of a name of the platform: letters, digits and underscores."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text.replace("&", " and ")).strip("_") or "unnamed"


# ------------------------------------------------------------------------------------------------ inputs and outputs


def _task_outputs(task: TaskCard) -> tuple[Io, Io, Io]:
    """The outputs that a task adds to the EAD: to both modes, to standalone alone, to preprocessing alone."""
    name = slug(task.name)
    both: Io = {}
    alone: Io = {}
    whole: Io = {}
    if task.kind in ("instances", "detect", "segment", "multisegment"):
        both[f"{name}_objects"] = _collection_type("polygon", "io.slide", about="io.slide")
        both[f"{name}_classes"] = _collection_type("class", f"io.{name}_objects.items")
    if task.kind in ("instances", "detect"):
        text = "objects per square millimetre"
        both[f"{name}_confidences"] = _collection_type("float", f"io.{name}_objects.items")
        both[f"{name}_map"] = {"type": "continuous_pixelmap", "reference": "io.slide", "description": text}
        alone[f"{name}_counts"] = _collection_type("integer", "io.regions.items")
        alone[f"{name}_densities"] = _collection_type("float", "io.regions.items")
        whole[f"{name}_slide_count"] = {"type": "integer", "reference": "io.slide"}
        whole[f"{name}_slide_density"] = {"type": "float", "reference": "io.slide"}
    if task.kind == "classify":
        both[f"{name}_classes"] = _collection_type("class", "io.tissue.items")
        both[f"{name}_slide_class"] = {"type": "string", "reference": "io.slide"}
    if task.kind in ("regress", "survive"):
        both[f"{name}_slide_value"] = {"type": "float", "reference": "io.slide"}
    if task.kind == "multilabel":
        both[f"{name}_slide_values"] = _collection_type("float", "io.slide")
    return both, alone, whole


def _collection_type(kind: str, reference: str, *, about: str | None = None) -> IoType:
    made: IoType = {"type": "collection", "items": {"type": kind, "reference": reference}}
    if about is not None:
        made["reference"] = about
    return made


def _join_outputs(some: list[Io]) -> Io:
    """All in one. ModelError when two tasks would share a name."""
    names = [name for one in some for name in one]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ModelError(f"two tasks would share the output '{twice}'; rename one in the model card")
    return {name: value for one in some for name, value in one.items()}


# ------------------------------------------------------------------------------------------------ names and classes


def _class_tree(card: ModelCard) -> ClassTree:
    return {
        slug(task.name): {
            leaf: {"name": _leaf_name(name)} for leaf, name in zip(_leaf_keys(task), task.classes, strict=True)
        }
        for task in card.tasks
        if task.kind in _CLASSED
    }


_CLASSED = ("instances", "detect", "segment", "multisegment", "classify")


def _rendering_rules(card: ModelCard, namespace: str) -> Iterator[dict[str, str]]:
    for task in card.tasks:
        if task.kind in _CLASSED:
            for leaf, (red, green, blue) in zip(_leaf_keys(task), task.colors, strict=True):
                value = f"{namespace}.classes.{slug(task.name)}.{leaf}"
                yield {"class_value": value, "color": f"#{red:02X}{green:02X}{blue:02X}"}


def _leaf_keys(task: TaskCard) -> list[str]:
    """The names of a task's classes in the tree; two that would be the same get their number."""
    plain = [slug(name) for name in task.classes]
    return [f"{name}_{i}" if plain.count(name) > 1 or name == "name" else name for i, name in enumerate(plain)]


def _leaf_name(name: str) -> str:
    """A class as it is shown: 3 to 30 letters, digits, blanks."""
    words = slug(name).replace("_", " ")
    return (words if len(words) >= 3 else f"class {words}")[:30].strip()


def _fit_name(name: str, longest: int) -> str:
    fit = re.sub(r"[^A-Za-z0-9_\s-]+", "-", name)[:longest].strip()
    return fit if len(fit) >= 3 else f"{fit} app"


def _describe_app(card: ModelCard) -> str:
    tasks = "; ".join(f"{task.name}: {', '.join(task.classes)}" for task in card.tasks)
    text = f"Research use only. Finds tissue and, at {card.mpp:g} micrometres per pixel, {tasks or 'nothing else'}."
    return text if len(text) <= 1000 else text[:999] + "…"
