"""Posting what was found: every output that the EAD promises for the job's mode (`ead`), in few requests.

Objects are read from the published files and posted piece by piece. A single object belongs to each region that holds
its centroid (see `outputs.inside`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from wsi_mmm.empaia.asked import Asked
from wsi_mmm.empaia.bodies import (
    Annotation,
    ClassOf,
    Collection,
    Polygon,
    Primitive,
    Record,
    Reference,
)
from wsi_mmm.empaia.client import AppApi, Mode
from wsi_mmm.empaia.density import Box, Density
from wsi_mmm.empaia.ead import class_values, ead, slug
from wsi_mmm.empaia.geometry import centres, polygons
from wsi_mmm.empaia.pixelmaps import tile_bytes
from wsi_mmm.empaia.promise import Promised
from wsi_mmm.empaia.results import Outline, Results
from wsi_mmm.empaia.verdicts import classes_of, number_of, numbers_of, overall_class
from wsi_mmm.model.card import ModelCard, TaskCard
from wsi_mmm.types import I64, REGION_KINDS, SlideInfo

PIECE = 5000  # objects posted at a time, and then their classes and confidences: memory is that of a piece
_CLOSEST, _FARTHEST = 1 / 16, 16.0  # of the resolution at which single objects were found: where viewers show them

Hear = Callable[[float], None]
"""Told the share of the objects that are posted, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All that is to be posted. ``tissue``: what of it lies in the regions; ``info``: the slide as it was read."""

    asked: Asked
    card: ModelCard
    vendor: str
    results: Results
    tissue: Sequence[Polygon]
    info: SlideInfo

    @property
    def npp(self) -> float:
        """Nanometres per px at which the model looked."""
        return float(self.results.facts["mpp_effective"]) * 1000

    def square_mm(self, pixels: float) -> float:
        """Level-0 px^2 as mm^2."""
        return pixels * (self.info.mpp_x or 0.0) * (self.info.mpp_y or 0.0) / 1e6


@dataclass(slots=True)
class _Tally:
    """Where the objects of one task lie."""

    density: Density
    total: int = 0
    regions: I64 = field(default_factory=lambda: np.zeros(0, np.int64))


async def post_all(api: AppApi, answer: Answer, hear: Hear) -> None:
    """Post every output that the EAD promises, and no other. Raises JobError, PlatformError, OutputError."""
    promised = Promised(api, ead(answer.card, vendor=answer.vendor), answer.asked)
    await _post(promised, answer, hear)
    promised.kept()


async def _post(api: Promised, answer: Answer, hear: Hear) -> None:
    about = Reference("wsi", answer.asked.wsi.id)
    tissue = await api.post_output("tissue", Collection("polygon", name="tissue", reference=about))
    drawn = [Annotation("tissue", shape, answer.asked.wsi, answer.npp) for shape in answer.tissue]
    ids = await _fill(api, tissue, drawn)
    for task in answer.card.tasks:
        name = slug(task.name)
        if task.kind in ("instances", "detect"):
            await _objects(api, answer, task, hear)
        elif task.kind in REGION_KINDS:
            await _areas(api, answer, task)
        elif task.kind == "classify":
            await _classes(api, answer, task, ids)
        elif task.kind in ("regress", "survive"):
            value = number_of(answer.results, task)
            await api.post_output(f"{name}_slide_value", Primitive(task.name, "float", value, about))
        elif task.kind == "multilabel":
            values = numbers_of(answer.results, task)
            each = [Primitive(c, "float", v, about) for c, v in zip(task.classes, values, strict=True)]
            await _fill(api, await api.post_output(f"{name}_slide_values", Collection("float", name=task.name)), each)


async def _fill(api: Promised, collection: str, records: Iterable[Record]) -> list[str]:
    return [one async for some in api.post_items(collection, records) for one in some]


# ------------------------------------------------------------------------------------------------ single objects


async def _objects(api: Promised, answer: Answer, task: TaskCard, hear: Hear) -> None:
    name, about = slug(task.name), Reference("wsi", answer.asked.wsi.id)
    objects = await api.post_output(f"{name}_objects", Collection("polygon", name=task.name, reference=about))
    classes = await api.post_output(f"{name}_classes", Collection("class"))
    confidences = await api.post_output(f"{name}_confidences", Collection("float", name="confidence"))
    tally = _Tally(Density(answer.info), regions=np.zeros(len(answer.asked.regions), np.int64))
    whole = max(1, answer.results.facts["objects"][task.name])
    values = dict(zip(task.classes, class_values(answer.card, task, vendor=answer.vendor), strict=True))
    for piece in _pieces(answer.results.outlines(task.name)):
        drawn = list(_drawn(piece, answer, task.name))
        ids = await _fill(api, objects, [annotation for annotation, _ in drawn])
        known = [(one, outline) for one, (_, outline) in zip(ids, drawn, strict=True)]
        await _fill(api, classes, (ClassOf(values[o.class_name], i) for i, o in known if o.class_name in values))
        await _fill(api, confidences, _confidences(known))
        _count(tally, [outline for _, outline in drawn], answer.asked)
        hear(min(1.0, tally.total / whole))
    await _post_tally(api, answer, task, tally)


def _pieces(outlines: Iterator[Outline]) -> Iterator[list[Outline]]:
    while piece := list(itertools.islice(outlines, PIECE)):
        yield piece


def _drawn(piece: Sequence[Outline], answer: Answer, name: str) -> Iterator[tuple[Annotation, Outline]]:
    """Objects with something left after rounding to whole px; one object stays one."""
    viewing = answer.npp * _CLOSEST, answer.npp * _FARTHEST
    for outline in piece:
        for shape in polygons(outline.rings, answer.asked.wsi, keep_holes=False):
            yield Annotation(outline.class_name or name, shape, answer.asked.wsi, answer.npp, viewing), outline


def _confidences(known: Sequence[tuple[str, Outline]]) -> Iterator[Primitive]:
    for one, outline in known:
        if (value := outline.numbers.get("probability")) is not None:
            yield Primitive("confidence", "float", min(max(float(value), 0.0), 1.0), Reference("annotation", one))


def _count(tally: _Tally, piece: Sequence[Outline], asked: Asked) -> None:
    if not piece:
        return
    points = centres([outline.rings for outline in piece])
    tally.total += len(piece)
    tally.density.add(points)
    for i, region in enumerate(asked.regions):
        tally.regions[i] += int(region.area.holds(points).sum())


async def _post_tally(api: Promised, answer: Answer, task: TaskCard, tally: _Tally) -> None:
    """The map, and counts and densities: of each region, or of the slide."""
    name, asked = slug(task.name), answer.asked
    density = tally.density.pixelmap(f"{task.name} density", asked.wsi.id, _worked(answer))
    posted = await api.post_output(f"{name}_map", density)
    for place, values in tally.density.tiles(density):
        await api.put_tile(density, posted, place, data=tile_bytes(density, values))
    if asked.mode is Mode.preprocessing:
        about = Reference("wsi", asked.wsi.id)
        square = answer.square_mm(sum(_area(one) for one in answer.tissue))
        per = tally.total / square if square > 0 else 0.0
        await api.post_output(f"{name}_slide_count", Primitive(f"{task.name} count", "integer", tally.total, about))
        await api.post_output(f"{name}_slide_density", Primitive(f"{task.name} per mm2", "float", per, about))
        return
    counts, densities = [], []
    for region, count in zip(asked.regions, tally.regions.tolist(), strict=True):
        about = Reference("annotation", region.id)
        per = count / answer.square_mm(region.area.size)
        counts.append(Primitive(f"{task.name} count", "integer", count, about))
        densities.append(Primitive(f"{task.name} per mm2", "float", per, about))
    await _fill(api, await api.post_output(f"{name}_counts", Collection("integer", name="counts")), counts)
    await _fill(api, await api.post_output(f"{name}_densities", Collection("float", name="densities")), densities)


def _worked(answer: Answer) -> list[Box]:
    """Where the map has tiles even if there is nothing: regions, or tissue."""
    if answer.asked.regions:
        return [region.area.bounds for region in answer.asked.regions]
    corners = [np.array(one.corners) for one in answer.tissue]
    return [(*map(float, c.min(axis=0)), *map(float, c.max(axis=0))) for c in corners]  # type: ignore[misc]


def _area(polygon: Polygon) -> float:
    x, y = np.array(polygon.corners, np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


# ------------------------------------------------------------------------------------------------ areas and classes


async def _areas(api: Promised, answer: Answer, task: TaskCard) -> None:
    """Areas, cut along their holes: each piece has the class of its area."""
    name, about = slug(task.name), Reference("wsi", answer.asked.wsi.id)
    objects = await api.post_output(f"{name}_objects", Collection("polygon", name=task.name, reference=about))
    classes = await api.post_output(f"{name}_classes", Collection("class"))
    values = dict(zip(task.classes, class_values(answer.card, task, vendor=answer.vendor), strict=True))
    for piece in _pieces(answer.results.outlines(task.name)):
        drawn = [
            (shape, outline.class_name)
            for outline in piece
            for shape in polygons(outline.rings, answer.asked.wsi, keep_holes=True)
        ]
        wsi = answer.asked.wsi
        ids = await _fill(api, objects, (Annotation(c or task.name, shape, wsi, answer.npp) for shape, c in drawn))
        named = zip(ids, drawn, strict=True)
        await _fill(api, classes, (ClassOf(values[c], one) for one, (_, c) in named if c in values))


async def _classes(api: Promised, answer: Answer, task: TaskCard, tissue_ids: Sequence[str]) -> None:
    """The class of each piece of tissue, and of the slide."""
    name, about = slug(task.name), Reference("wsi", answer.asked.wsi.id)
    values = class_values(answer.card, task, vendor=answer.vendor)
    found = classes_of(answer.results, task, answer.tissue)
    collection = await api.post_output(f"{name}_classes", Collection("class"))
    known = [(one, c) for one, c in zip(tissue_ids, found, strict=True) if c is not None]
    await _fill(api, collection, (ClassOf(values[c], one) for one, c in known))
    best = overall_class(answer.results, task)
    said = "not determined" if best is None else task.classes[best]
    await api.post_output(f"{name}_slide_class", Primitive(task.name, "string", said, about))
