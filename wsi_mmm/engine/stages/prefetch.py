"""Fetching the tiles of forward units before their turn, from slides that are far away."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby

from wsi_mmm.engine.plan import forward_units
from wsi_mmm.engine.stages.context import UnitContext, UnitFetches
from wsi_mmm.engine.stages.forward import is_complete
from wsi_mmm.engine.stages.workdir import listed_places
from wsi_mmm.engine.units import SlidePlan, WorkUnit
from wsi_mmm.errors import WsiError
from wsi_mmm.slides.base import Fetched, TileReader
from wsi_mmm.tiles.grid import tiles_at
from wsi_mmm.tiles.listed import tile_groups
from wsi_mmm.tiles.stream import Prefetcher, fetch_groups, is_far
from wsi_mmm.types import Tiles


@dataclass(slots=True)
class UnitPrefetch:
    """Has the tiles of several units fetched at once, in the order of their reading, while others are computed.

    Slides on a local disk are left out, and units whose values are in the cache. Units take from ``fetches`` what is
    there; what could not be fetched they read by themselves.
    """

    fetches: UnitFetches = field(default_factory=Prefetcher)
    _plans: dict[str, SlidePlan] = field(default_factory=dict)  # slides of which no forward unit has started

    def add_plan(self, plan: SlidePlan) -> None:
        """Take in the plan of a slide: its units are announced when the first of them starts."""
        self._plans[plan.slide.id] = plan

    def start_unit(self, unit: WorkUnit) -> None:
        """Announce the slide's forward units when this is the first; none when extract units fill the tile cache."""
        if unit.kind in ("forward", "extract") and unit.slide.id in self._plans:
            plan = self._plans.pop(unit.slide.id)
            if unit.kind == "forward":
                self.announce(forward_units(plan))

    def announce(self, units: Sequence[WorkUnit], first: float = 0.5) -> None:
        """Announce forward units of one slide, in the order of their reading; ``first``: see `fetch_groups`."""
        try:
            with closing(UnitContext(units[0])) as ctx:
                far = is_far(ctx.slide.reader)
        except WsiError:  # the units say what is wrong
            return
        tiles = {unit: tiles_at(unit.planned_grid, unit.index()) for unit in units if far}
        for group in fetch_groups(tiles, first):
            self.fetches.announce(group, _fetch_units)

    def announce_bundle(self, units: Sequence[WorkUnit]) -> None:
        """Announce the units that a worker was sent together: the first is fetched alone, and the others meanwhile."""
        if len(units) > 1 and units[0].kind == "forward":
            for _, some in groupby(units, lambda unit: unit.slide):
                self.announce(list(some), first=0)

    def drop_slide(self, slide: str) -> None:
        """Forget the units of a slide that has failed: they will not be read."""
        self._plans.pop(slide, None)
        self.fetches.drop([unit for unit in self.fetches.keys_left() if unit.slide.id == slide])

    def close(self) -> None:
        """Fetch nothing more, and wait for the threads to end."""
        self.fetches.close()


def _fetch_units(units: list[WorkUnit]) -> Fetched | None:
    todo = [unit for unit in units if not is_complete(UnitContext(unit))]
    tiles = [part for unit in todo for part in _unit_tiles(unit)]
    if not tiles:
        return None
    with closing(UnitContext(todo[0])) as ctx:
        reader = ctx.slide.reader if ctx.grid.listed else ctx.reader(tiles[0])
        return reader.fetch(tiles) if isinstance(reader, TileReader) else None


def _unit_tiles(unit: WorkUnit) -> list[Tiles]:
    """The tiles of a forward unit; of listed ones those on the grid of target px, the others are read when needed."""
    grid = unit.planned_grid
    if not grid.listed:
        return [tiles_at(grid, unit.index())]
    return [tiles for _, origin, tiles in tile_groups(grid, listed_places(unit)) if origin == (0, 0)]
