"""Ways to break the description of an app, and words of what our linter says then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wsi_mmm.empaia import lint


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        for step in path[:-1]:
            made = made[step]
        made[path[-1]] = to

    return change


POST = {"inputs": ["slide"], "outputs": ["tissue"], "containerized": True}
NOMINAL = {"type": "nominal_pixelmap", "reference": "io.slide", "element_classes": ["org.empaia.a.b.v3.0.classes.no"]}
POLYGON = {"type": "polygon", "reference": "io.slide"}
ROI = [f"{lint.GLOBAL}.classes.roi"]
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "element classes": (_set("io", "nuclei_map", to=NOMINAL), "names the class"),
    "postprocessing": (_set("modes", to={"standalone": POST, "postprocessing": POST}), "needs preprocessing"),
    "another mode": (_set("modes", "preprocessing", "outputs", to=["nuclei_counts"]), "not in that mode"),
    "nested constraint": (_set("io", "tissue", "items", to={**POLYGON, "classes": ROI}), "may not restrict"),
    "constraint": (_set("io", "tissue", to={**POLYGON, "classes": ROI}), "may not restrict"),
    "no target": (_set("io", "tissue", "reference", to="io.nothing"), "which there is not"),
    "wrong target": (_set("io", "nuclei_map", "reference", to="io.tissue"), "cannot refer"),
    "unused": (_set("io", "spare_key", to={"type": "float"}), "in no mode"),
    "unknown key": (_set("modes", "standalone", "inputs", to=["slide", "regions", "else"]), "names else"),
    "two wsi": (_set("modes", "preprocessing", "inputs", to=["slide", "regions"]), "one input"),
    "both ways": (_set("modes", "standalone", "inputs", to=["slide", "regions", "tissue"]), "as input and as output"),
    "no container": (_set("modes", "standalone", "containerized", to=False), "runs a container"),
    "unsaid": (_set("modes", "postprocessing", to={"inputs": ["slide"], "outputs": []}), "must say"),
    "no mode": (_set("modes", to={}), "it needs the mode"),
    "class of rendering": (_set("classes", to={}), "which there is not"),
    "input of output": (_set("io", "regions", "items", "reference", to="io.tissue"), "refers to the output"),
}


def _without_preprocessing(made: dict[str, Any]) -> None:
    made["modes"]["postprocessing"] = {**made["modes"].pop("preprocessing"), "containerized": True}


def _of_another_mode(made: dict[str, Any]) -> None:
    made["modes"]["preprocessing"]["outputs"].append("nuclei_counts")


GAPS: dict[str, Callable[[dict[str, Any]], None]] = {
    "element classes": BROKEN["element classes"][0],
    "postprocessing": _without_preprocessing,
    "another mode": _of_another_mode,
    "nested constraint": BROKEN["nested constraint"][0],
}
"""One rule broken each, which the official validator, as of 3.7.0, does not check."""
