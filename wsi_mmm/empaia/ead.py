"""The EAD: what an app of a model reads and gives, written from the model's card.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wsi_mmm.empaia.lint import GLOBAL, problems
from wsi_mmm.errors import ModelError, OutputError
from wsi_mmm.model.card import ModelCard, TaskCard

Regions = Literal["rectangle", "polygon", "circle"]
SCHEMA = "https://gitlab.com/empaia/integration/definitions/-/raw/main/ead/ead-schema.v3.json"

Io = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What a task adds to the EAD: to both modes, to standalone alone, to preprocessing alone."""

    both: Io
    regions: Io
    slide: Io


def ead(card: ModelCard, *, vendor: str = "wsi_mmm", regions: Regions = "rectangle") -> dict[str, Any]:
    """The description of ``card`` as an app. ModelError when a name cannot be one of the platform."""
    namespace = f"org.empaia.{slug(vendor)}.{slug(card.name)}.v3.0"
    some = [_of_task(task) for task in card.tasks]
    slide: Io = {"slide": {"type": "wsi"}}
    asked = {"type": regions, "reference": "io.slide", "classes": [f"{GLOBAL}.classes.roi"]}
    rois: Io = {"regions": {"type": "collection", "items": asked}}
    both = _joined([{"tissue": _collection("polygon", "io.slide", about="io.slide")}, *(one.both for one in some)])
    alone, whole = _joined([one.regions for one in some]), _joined([one.slide for one in some])
    made = {
        "$schema": SCHEMA,
        "name": _fit(f"wsi_mmm {card.name}", 30),
        "name_short": _fit(card.name, 10),
        "namespace": namespace,
        "description": _description(card),
        "io": _joined([slide, rois, both, alone, whole]),
        "classes": _classes(card),
        "rendering": {"annotations": list(_rendering(card, namespace))},
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


def ead_json(made: dict[str, Any]) -> str:
    """The text of ``ead.json``."""
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def write_ead(text: str, folder: Path) -> Path:
    """Write ``ead.json`` to ``folder``, which is made: its path. OutputError when that cannot be."""
    path = folder / "ead.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def class_values(card: ModelCard, task: TaskCard, *, vendor: str = "wsi_mmm") -> tuple[str, ...]:
    """The platform's names of a task's classes, in the card's order."""
    base = f"org.empaia.{slug(vendor)}.{slug(card.name)}.v3.0.classes.{slug(task.name)}"
    return tuple(f"{base}.{leaf}" for leaf in _leaves(task))


def slug(text: str) -> str:
    """``text`` with the characters of a name of the platform: letters, digits and underscores."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text.replace("&", " and ")).strip("_") or "unnamed"


# ------------------------------------------------------------------------------------------------ inputs and outputs


def _of_task(task: TaskCard) -> _Outputs:
    make = _KINDS.get(task.kind)
    return _Outputs({}, {}, {}) if make is None else make(slug(task.name))


def _objects(name: str) -> _Outputs:
    area = _area(name)
    items = f"io.{name}_objects.items"
    return _Outputs(
        both={
            **area.both,
            f"{name}_confidences": _collection("float", items),
            f"{name}_map": {
                "type": "continuous_pixelmap",
                "reference": "io.slide",
                "description": "objects per square millimetre",
            },
        },
        regions={
            f"{name}_counts": _collection("integer", "io.regions.items"),
            f"{name}_densities": _collection("float", "io.regions.items"),
        },
        slide={
            f"{name}_slide_count": {"type": "integer", "reference": "io.slide"},
            f"{name}_slide_density": {"type": "float", "reference": "io.slide"},
        },
    )


def _area(name: str) -> _Outputs:
    objects = _collection("polygon", "io.slide", about="io.slide")
    return _Outputs(
        {f"{name}_objects": objects, f"{name}_classes": _collection("class", f"io.{name}_objects.items")}, {}, {}
    )


def _choice(name: str) -> _Outputs:
    whole = {"type": "string", "reference": "io.slide"}
    return _Outputs({f"{name}_classes": _collection("class", "io.tissue.items"), f"{name}_slide_class": whole}, {}, {})


def _number(name: str) -> _Outputs:
    return _Outputs({f"{name}_slide_value": {"type": "float", "reference": "io.slide"}}, {}, {})


def _numbers(name: str) -> _Outputs:
    return _Outputs({f"{name}_slide_values": _collection("float", "io.slide")}, {}, {})


_KINDS: dict[str, Callable[[str], _Outputs]] = {
    "instances": _objects,
    "detect": _objects,
    "segment": _area,
    "multisegment": _area,
    "classify": _choice,
    "regress": _number,
    "survive": _number,
    "multilabel": _numbers,
}


def _collection(kind: str, reference: str, *, about: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "collection", "items": {"type": kind, "reference": reference}}
    return made if about is None else {**made, "reference": about}


def _joined(some: list[Io]) -> Io:
    """All in one. ModelError when two tasks would share a name."""
    names = [name for one in some for name in one]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ModelError(f"two tasks would share the output '{twice}'; rename one in the model card")
    return {name: value for one in some for name, value in one.items()}


# ------------------------------------------------------------------------------------------------ names and classes


def _classes(card: ModelCard) -> dict[str, Any]:
    return {
        slug(task.name): {
            leaf: {"name": _leaf_name(name)} for leaf, name in zip(_leaves(task), task.classes, strict=True)
        }
        for task in card.tasks
        if task.kind in _CLASSED
    }


_CLASSED = ("instances", "detect", "segment", "multisegment", "classify")


def _rendering(card: ModelCard, namespace: str) -> Iterator[dict[str, str]]:
    for task in card.tasks:
        if task.kind in _CLASSED:
            for leaf, (red, green, blue) in zip(_leaves(task), task.colors, strict=True):
                value = f"{namespace}.classes.{slug(task.name)}.{leaf}"
                yield {"class_value": value, "color": f"#{red:02X}{green:02X}{blue:02X}"}


def _leaves(task: TaskCard) -> list[str]:
    """The names of a task's classes in the tree; two that would be the same get their number."""
    plain = [slug(name) for name in task.classes]
    return [f"{name}_{i}" if plain.count(name) > 1 or name == "name" else name for i, name in enumerate(plain)]


def _leaf_name(name: str) -> str:
    """A class as it is shown: 3 to 30 letters, digits, blanks."""
    words = slug(name).replace("_", " ")
    return (words if len(words) >= 3 else f"class {words}")[:30].strip()


def _fit(name: str, longest: int) -> str:
    fit = re.sub(r"[^A-Za-z0-9_\s-]+", "-", name)[:longest].strip()
    return fit if len(fit) >= 3 else f"{fit} app"


def _description(card: ModelCard) -> str:
    tasks = "; ".join(f"{task.name}: {', '.join(task.classes)}" for task in card.tasks)
    text = f"Research use only. Finds tissue and, at {card.mpp:g} micrometres per pixel, {tasks or 'nothing else'}."
    return text if len(text) <= 1000 else text[:999] + "…"
