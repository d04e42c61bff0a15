"""Posting what was found: every output that the EAD promises for the job's mode (`ead`), in few requests.

Objects are read from the published files and posted block by block. A single object belongs to each region that holds
its centroid (see `outputs.inside`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from wsi_mmm.empaia.bodies import (
    Annotation,
    ClassOf,
    Collection,
    Polygon,
    Primitive,
    Record,
    Reference,
)
from wsi_mmm.empaia.check_outputs import CheckedOutputs
from wsi_mmm.empaia.client import AppApi, Mode
from wsi_mmm.empaia.ead import class_values, ead, slug
from wsi_mmm.empaia.geometry import centres, polygons
from wsi_mmm.empaia.job_inputs import JobInputs
from wsi_mmm.empaia.pixelmaps import DensityGrid, PixelBox, tile_bytes
from wsi_mmm.empaia.results import Outline, Results, slide_class, slide_value, slide_values, tissue_classes
from wsi_mmm.model.card import ModelCard, TaskCard
from wsi_mmm.types import I64, REGION_KINDS, SlideInfo

BLOCK = 5000  # objects posted at a time, and then their classes and confidences: memory is that of a block
_CLOSEST, _FARTHEST = 1 / 16, 16.0  # of the resolution at which single objects were found: where viewers show them

ReportShare = Callable[[float], None]
"""Told the share of the objects that are posted, 0 to 1."""


@dataclass(frozen=True, slots=True)
class JobOutputs:
    """All that is to be posted. ``tissue``: what of it lies in the regions; ``info``: the slide as it was read."""

    inputs: JobInputs
    card: ModelCard
    vendor: str
    results: Results
    tissue: Sequence[Polygon]
    info: SlideInfo

    @property
    def slide(self) -> Reference:
        """The reference of outputs about the whole slide."""
        return Reference("wsi", self.inputs.wsi.id)

    @property
    def npp(self) -> float:
        """Nanometres per px at which the model looked."""
        return float(self.results.facts["mpp_effective"]) * 1000

    def area_mm2(self, pixels: float) -> float:
        """Level-0 px^2 as mm^2."""
        return pixels * (self.info.mpp_x or 0.0) * (self.info.mpp_y or 0.0) / 1e6

    def values(self, task: TaskCard) -> dict[str, str]:
        """The platform's names of a task's classes, by ours."""
        return dict(zip(task.classes, class_values(self.card, task, vendor=self.vendor), strict=True))


@dataclass(slots=True)
class _Tally:
    """Where the objects of one task lie."""

    density: DensityGrid
    total: int = 0
    regions: I64 = field(default_factory=lambda: np.zeros(0, np.int64))


async def post_all(api: AppApi, outputs: JobOutputs, report_share: ReportShare) -> None:
    """Post every output that the EAD promises, and no other. Raises JobError, PlatformError, OutputError."""
    checked = CheckedOutputs(api, ead(outputs.card, vendor=outputs.vendor), outputs.inputs)
    drawn = [Annotation("tissue", shape, outputs.inputs.wsi, outputs.npp) for shape in outputs.tissue]
    ids = await _post_collection(
        checked, "tissue", Collection("polygon", name="tissue", reference=outputs.slide), drawn
    )
    for task in outputs.card.tasks:
        if task.kind in ("instances", "detect"):
            await _post_objects(checked, outputs, task, report_share)
        elif task.kind in REGION_KINDS:
            await _post_areas(checked, outputs, task)
        elif task.kind == "classify":
            await _post_classes(checked, outputs, task, ids)
        elif task.kind in ("regress", "survive"):
            value = Primitive(task.name, "float", slide_value(outputs.results, task), outputs.slide)
            await checked.post_output(f"{slug(task.name)}_slide_value", value)
        elif task.kind == "multilabel":
            values = zip(task.classes, slide_values(outputs.results, task), strict=True)
            each = [Primitive(name, "float", value, outputs.slide) for name, value in values]
            key = f"{slug(task.name)}_slide_values"
            await _post_collection(checked, key, Collection("float", name=task.name), each)
    checked.check_all_posted()


async def _post_collection(
    api: CheckedOutputs, key: str, collection: Collection, records: Iterable[Record]
) -> list[str]:
    return await _fill_collection(api, await api.post_output(key, collection), records)


async def _fill_collection(api: CheckedOutputs, collection: str, records: Iterable[Record]) -> list[str]:
    return [one async for some in api.post_items(collection, records) for one in some]


# ------------------------------------------------------------------------------------------------ objects, areas


async def _post_objects(api: CheckedOutputs, outputs: JobOutputs, task: TaskCard, report_share: ReportShare) -> None:
    name, values, regions = slug(task.name), outputs.values(task), outputs.inputs.regions
    about = Collection("polygon", name=task.name, reference=outputs.slide)
    objects = await api.post_output(f"{name}_objects", about)
    classes = await api.post_output(f"{name}_classes", Collection("class"))
    confidences = await api.post_output(f"{name}_confidences", Collection("float", name="confidence"))
    tally = _Tally(DensityGrid(outputs.info), regions=np.zeros(len(regions), np.int64))
    whole = max(1, outputs.results.facts["objects"][task.name])
    for block in _outline_blocks(outputs.results.outlines(task.name)):
        drawn = list(_draw_objects(block, outputs, task.name))
        ids = await _fill_collection(api, objects, [annotation for annotation, _ in drawn])
        known = [(one, outline) for one, (_, outline) in zip(ids, drawn, strict=True)]
        named = (ClassOf(values[o.class_name], one) for one, o in known if o.class_name in values)
        await _fill_collection(api, classes, named)
        await _fill_collection(api, confidences, _confidence_values(known))
        if known:
            points = centres([outline.rings for _, outline in known])
            tally.total += len(known)
            tally.density.add(points)
            tally.regions += np.array([region.area.holds(points).sum() for region in regions], np.int64)
        report_share(min(1.0, tally.total / whole))
    await _post_tally(api, outputs, task, tally)


async def _post_areas(api: CheckedOutputs, outputs: JobOutputs, task: TaskCard) -> None:
    """Areas, cut along their holes: each part has the class of its area."""
    name, values, wsi = slug(task.name), outputs.values(task), outputs.inputs.wsi
    about = Collection("polygon", name=task.name, reference=outputs.slide)
    objects = await api.post_output(f"{name}_objects", about)
    classes = await api.post_output(f"{name}_classes", Collection("class"))
    for block in _outline_blocks(outputs.results.outlines(task.name)):
        parts = [(one.class_name, part) for one in block for part in polygons(one.rings, wsi, keep_holes=True)]
        drawn = (Annotation(c or task.name, part, wsi, outputs.npp) for c, part in parts)
        ids = await _fill_collection(api, objects, drawn)
        named = zip(ids, parts, strict=True)
        await _fill_collection(api, classes, (ClassOf(values[c], one) for one, (c, _) in named if c in values))


def _outline_blocks(outlines: Iterator[Outline]) -> Iterator[list[Outline]]:
    while block := list(itertools.islice(outlines, BLOCK)):
        yield block


def _draw_objects(block: Sequence[Outline], outputs: JobOutputs, name: str) -> Iterator[tuple[Annotation, Outline]]:
    """Objects with something left after rounding to whole px; one object stays one."""
    viewing = outputs.npp * _CLOSEST, outputs.npp * _FARTHEST
    for outline in block:
        for shape in polygons(outline.rings, outputs.inputs.wsi, keep_holes=False):
            yield Annotation(outline.class_name or name, shape, outputs.inputs.wsi, outputs.npp, viewing), outline


def _confidence_values(known: Sequence[tuple[str, Outline]]) -> Iterator[Primitive]:
    for one, outline in known:
        if (value := outline.numbers.get("probability")) is not None:
            yield Primitive("confidence", "float", min(max(float(value), 0.0), 1.0), Reference("annotation", one))


async def _post_tally(api: CheckedOutputs, outputs: JobOutputs, task: TaskCard, tally: _Tally) -> None:
    """The map, and counts and densities: of each region, or of the slide."""
    name, inputs = slug(task.name), outputs.inputs
    density = tally.density.pixelmap(f"{task.name} density", inputs.wsi.id, _covered_boxes(outputs))
    posted = await api.post_output(f"{name}_map", density)
    for place, values in tally.density.tiles(density):
        await api.put_tile(density, posted, place, data=tile_bytes(density, values))
    if inputs.mode is Mode.preprocessing:
        area = outputs.area_mm2(sum(_polygon_area(one) for one in outputs.tissue))
        count, density_of = _count_and_density(task, tally.total, area, outputs.slide)
        await api.post_output(f"{name}_slide_count", count)
        await api.post_output(f"{name}_slide_density", density_of)
        return
    pairs = [
        _count_and_density(task, count, outputs.area_mm2(region.area.size), Reference("annotation", region.id))
        for region, count in zip(inputs.regions, tally.regions.tolist(), strict=True)
    ]
    await _post_collection(api, f"{name}_counts", Collection("integer", name="counts"), [c for c, _ in pairs])
    await _post_collection(api, f"{name}_densities", Collection("float", name="densities"), [d for _, d in pairs])


def _count_and_density(task: TaskCard, count: int, mm2: float, about: Reference) -> tuple[Primitive, Primitive]:
    per = count / mm2 if mm2 > 0 else 0.0
    return (
        Primitive(f"{task.name} count", "integer", count, about),
        Primitive(f"{task.name} per mm2", "float", per, about),
    )


def _covered_boxes(outputs: JobOutputs) -> list[PixelBox]:
    """Where the map has tiles even if there is nothing: regions, or tissue."""
    if outputs.inputs.regions:
        return [region.area.bounds for region in outputs.inputs.regions]
    corners = [np.array(one.corners) for one in outputs.tissue]
    return [(*map(float, c.min(axis=0)), *map(float, c.max(axis=0))) for c in corners]  # type: ignore[misc]


def _polygon_area(polygon: Polygon) -> float:
    x, y = np.array(polygon.corners, np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


# ------------------------------------------------------------------------------------------------ classes


async def _post_classes(api: CheckedOutputs, outputs: JobOutputs, task: TaskCard, tissue_ids: Sequence[str]) -> None:
    """The class of each part of the tissue, and of the slide."""
    name, values = slug(task.name), class_values(outputs.card, task, vendor=outputs.vendor)
    found = zip(tissue_ids, tissue_classes(outputs.results, task, outputs.tissue), strict=True)
    records = (ClassOf(values[number], one) for one, number in found if number is not None)
    await _post_collection(api, f"{name}_classes", Collection("class"), records)
    best = slide_class(outputs.results, task)
    text = "not determined" if best is None else task.classes[best]
    await api.post_output(f"{name}_slide_class", Primitive(task.name, "string", text, outputs.slide))
