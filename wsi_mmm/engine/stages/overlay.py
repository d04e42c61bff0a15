"""The overlay of a slide: gathered while its objects are written, drawn at the end. Memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from wsi_mmm.engine.units import SlidePlan
from wsi_mmm.outputs import polygons
from wsi_mmm.outputs.density import Density
from wsi_mmm.outputs.overlay import Field, Scene, legend_counts, overlay_png
from wsi_mmm.slides import Slide
from wsi_mmm.types import I64, Block, Grid, Mask, Objects, TaskInfo

THUMBNAIL = 1600
FIELD_PX = 400  # side of a close-up in target px
FIELDS = 4
MASK_PX = 4  # px of the tissue mask per tile
MAX_AREAS = 20_000  # regions or tiles drawn on the thumbnail

FindObjects = Callable[[TaskInfo, tuple[float, float, float, float]], Objects]


@dataclass(slots=True)
class Picture:
    """Gathers where objects are, then draws the slide, their density, and a few dense fields close up."""

    slide: Slide
    plan: SlidePlan
    density: Density = field(init=False)
    areas: list[tuple[TaskInfo, Objects]] = field(default_factory=list)
    instances: list[TaskInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.density = Density(self.plan.info.width, self.plan.info.height)

    def add(self, info: TaskInfo, objects: Objects) -> None:
        """Take in objects that are being written."""
        if info.dissolves:
            self.areas.append((info, polygons.part(objects, 0, min(len(objects), MAX_AREAS))))
        elif not info.draws_tiles:
            # Level-0 centres of the owning pixels.
            self.density.add(
                (objects.anchor[:, ::-1] + 0.5) * np.array([self.plan.grid.scale_x, self.plan.grid.scale_y])
            )
            if info not in self.instances:
                self.instances.append(info)

    def png(self, infos: Iterable[TaskInfo], classes: dict[str, dict[str, int]], find: FindObjects) -> bytes:
        """The picture. ``find`` gives the objects of a task inside a level-0 rectangle (x0, y0, x1, y1)."""
        info, plan = self.plan.info, self.plan
        tiles = f"{len(plan.index):,} tiles of {plan.grid.tile} px at {plan.grid.mpp:g} µm/px"
        size = f"{info.width:,} x {info.height:,} px"
        scene = Scene(
            title=plan.slide.id,
            subtitle=f"{size}  ·  {tiles}  ·  {info.vendor}",
            thumbnail=self.slide.thumbnail(THUMBNAIL),
            width=info.width,
            height=info.height,
            mpp=info.mpp_x,
            tissue=self._tissue_mask(),
            density=self.density if self.instances else None,
            areas=self.areas,
            fields=self._dense_fields(find),
            counts=legend_counts(list(infos), classes),
        )
        return overlay_png(scene)

    def _tissue_mask(self) -> Mask:
        """The tiles of the plan, as a mask that covers just the slide, wherever the last tiles end."""
        grid = self.plan.grid
        tiles = np.zeros((grid.rows, grid.columns), bool)
        tiles[self.plan.index[:, 0], self.plan.index[:, 1]] = True
        return tiles[np.ix_(_tile_of(grid.height, grid.rows, grid), _tile_of(grid.width, grid.columns, grid))]

    def _dense_fields(self, find: FindObjects) -> list[Field]:
        grid, fields = self.plan.grid, []
        side = FIELD_PX * max(grid.scale_x, grid.scale_y)
        scale = grid.scale_x  # both ways: outlines are drawn with one scale, also where mpp_x and mpp_y differ
        for x, y in self.density.densest(side, FIELDS) if self.instances else []:
            block = Block(0, 0, FIELD_PX, FIELD_PX, scale, scale, int(x), int(y))
            box = (int(x), int(y), int(x) + FIELD_PX * scale, int(y) + FIELD_PX * scale)
            found = [(info, find(info, box)) for info in self.instances]
            fields.append(Field(self.slide.reader.read(block).pixels, int(x), int(y), scale, found))
        return fields


def _tile_of(length: int, count: int, grid: Grid) -> I64:
    """The tile that each of the evenly spaced px along a side of ``length`` target px lies in: `MASK_PX` per stride."""
    places = max(1, round(MASK_PX * length / grid.stride))
    found: I64 = np.minimum(((np.arange(places) + 0.5) * length / places / grid.stride).astype(np.int64), count - 1)
    return found
