"""Slides as a Source: items are places, read many at a time by the road of `run`, with target from annotations, from
tables, or both."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from wsi_mmm.annotations import Shapes, parse_shapes
from wsi_mmm.cache.slide_pool import SlideKey, SlidePool, TileCaching
from wsi_mmm.errors import ConfigError, InputError, ManifestError, WsiError
from wsi_mmm.slides import Slide
from wsi_mmm.slides.base import Fetched, TileReader
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Target
from wsi_mmm.tiles.grid import level0_boxes, make_grid
from wsi_mmm.tiles.stream import is_far, read_tiles
from wsi_mmm.tiles.tissue import MIN_TISSUE, select_tiles, tissue_mask
from wsi_mmm.training.data.annotation_targets import (
    TILE_LEVEL_KINDS,
    AnnotationTarget,
    annotations_for_task,
    choose,
    map_targets,
    tile_targets,
)
from wsi_mmm.training.data.base import FetchedItems, ItemIndex, Sample
from wsi_mmm.training.data.buckets import BucketReport, Buckets, dry_run
from wsi_mmm.training.data.objects import drawn_places
from wsi_mmm.training.data.regions import UNKNOWN, SlideAnnotations, grid_places
from wsi_mmm.training.data.shapes_index import index_shapes
from wsi_mmm.training.data.tables import SlideTable
from wsi_mmm.types import I32, I64, Mask, Tiles

_log = logging.getLogger(__name__)
_OPENING = 4  # slides prepared at a time
KEPT_OPEN = 16  # slides that stay open while nobody reads them


@dataclass(frozen=True, slots=True)
class SlideItem:
    """A slide to learn from. ``mpp`` overrides what it says; ``annotations``: path or URI of its GeoJSON or ASAP XML;
    ``group``: its patient ("": the slide by itself); ``targets``: what is known of the whole slide, by task, and
    ``label`` the class of it that balancing goes by where tiles have none."""

    id: str
    uri: str
    mpp: float | None = None
    annotations: str | None = None
    group: str = ""
    targets: Mapping[str, Target] = field(default_factory=dict)
    label: int = UNKNOWN

    @property
    def slide_key(self) -> SlideKey:
        """The slide to open."""
        return SlideKey(self.uri, self.mpp)


@dataclass(frozen=True, slots=True)
class TileSampling:
    """How tiles of ``tile`` px at ``mpp`` are chosen as items.

    ``by`` "grid": of a grid from the slide's corner with ``stride`` (0: the tile's side), those that the first
    annotation target can learn from; without annotation targets, those with at least ``min_tissue`` tissue. ``by``
    "objects": ``per_slide`` tiles drawn round the objects of the first annotation target, every class alike.
    ``per_slide``: at most so many (0: all), drawn by ``seed``. ``dot_um``: radius of the disc that a point stands for
    (0: points are left out)."""

    mpp: float
    tile: int = 256
    stride: int = 0
    by: Literal["grid", "objects"] = "grid"
    per_slide: int = 0
    min_tissue: float = MIN_TISSUE
    seed: int = 0
    dot_um: float = 0.0

    def __post_init__(self) -> None:
        if self.tile < 1 or not 0 <= self.stride <= self.tile:
            raise ConfigError(f"tile {self.tile}, stride {self.stride}: give 1 or more, the stride up to the tile")
        if self.by not in ("grid", "objects") or (self.by == "objects" and self.per_slide < 1):
            raise ConfigError("places are chosen by 'grid', or by 'objects' with per_slide of 1 or more")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A slide with its places ``xy`` int64[n, 2] (target px), classes for balancing, targets of patch tasks by item,
    and sheets of the tasks whose target is drawn when it is read."""

    item: SlideItem
    scale: tuple[float, float]
    xy: I64
    labels: I32
    by_tile: Mapping[str, Sequence[Target]]
    annotated_by_task: Mapping[str, SlideAnnotations]
    remote: bool

    def tiles(self, local: I64, tile: int, size: int) -> Tiles:
        """Return the squares of ``size`` px round the middles of its items ``local``, tiles of ``tile`` px."""
        return Tiles(self.xy[local] + (tile - size) // 2, size, *self.scale)


@dataclass(frozen=True)
class SlideTiles:
    """A Source of tiles of slides; see `slide_tiles`. ``broken``: slides that could not be prepared, and why."""

    name: str
    tasks: tuple[str, ...]
    index: ItemIndex
    tile: int
    pool: SlidePool
    caching: TileCaching | None
    slides: Sequence[_Prepared]
    specs: Sequence[AnnotationTarget]
    starts: I64  # int64[slides + 1]: numbers of each slide's first item
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, int]:
        """Tiles by slide."""
        return {one.item.id: len(one.xy) for one in self.slides}

    @property
    def remote(self) -> bool:
        """True if reading some of its slides waits for a network."""
        return any(slide.remote for slide in self.slides)

    def fetch(self, numbers: Sequence[int], size: int) -> dict[int, Fetched | None]:
        """Fetch what ``read`` of the same items needs, by slide; see `SlideSource`."""
        found: dict[int, Fetched | None] = {}
        for number, _, local in self._items_by_slide(numbers):
            slide = self.slides[number]
            if slide.remote:
                found[number] = fetch_tiles(self.pool, slide.item, slide.tiles(local, self.tile, size), self.caching)
        return found

    def read(self, numbers: Sequence[int], size: int, fetched: FetchedItems | None = None) -> list[Sample]:
        """Squares of ``size`` px round the middles of these items, slide by slide, in the order of ``numbers``.

        Truth per px and boxes are those of the square; labels and numbers those of the item's own tile, whatever
        ``size`` is.
        """
        found: list[Sample | None] = [None] * len(numbers)
        for slide, at, local in self._items_by_slide(numbers):
            samples = self._read_samples(slide, local, size, (fetched or {}).get(slide))
            for position, sample in zip(at.tolist(), samples, strict=True):
                found[position] = sample
        return [sample for sample in found if sample is not None]

    def _items_by_slide(self, numbers: Sequence[int]) -> Iterator[tuple[int, I64, I64]]:
        """Yield the number of each slide, the positions of its items in ``numbers``, and their numbers in the slide."""
        items = np.asarray(numbers, np.int64)
        owner = np.searchsorted(self.starts, items, "right") - 1
        for slide in np.unique(owner).tolist():
            at = np.flatnonzero(owner == slide)
            yield slide, at, items[at] - self.starts[slide]

    def _read_samples(self, number: int, local: I64, size: int, fetched: Fetched | None) -> list[Sample]:
        slide = self.slides[number]
        keys = [self.index.keys[item] for item in (local + self.starts[number]).tolist()]
        tiles = slide.tiles(local, self.tile, size)
        try:
            with self.pool.reader(slide.item.slide_key, tiles, self.caching) as reader:
                pixels, failed = read_tiles(reader, tiles, fetched)
        except WsiError as error:
            return [Sample(key, failed=str(error)) for key in keys]
        targets = self._read_targets(slide, local, tiles.xy, size)
        reasons = _rejection_reasons(slide.item, tiles, failed)
        return [
            Sample(key, failed=reason) if reason else Sample(key, pixels=pixels[n], targets=targets[n])
            for n, (key, reason) in enumerate(zip(keys, reasons, strict=True))
        ]

    def _read_targets(self, slide: _Prepared, local: I64, corners: I64, size: int) -> list[dict[str, Target]]:
        found: list[dict[str, Target]] = [dict(slide.item.targets) for _ in local]
        for spec in self.specs:
            if spec.task in slide.by_tile:
                values: Sequence[Target] = [slide.by_tile[spec.task][n] for n in local.tolist()]
            elif spec.task in slide.annotated_by_task:
                values = map_targets(spec, slide.annotated_by_task[spec.task], corners, size)
            else:
                continue
            for targets, value in zip(found, values, strict=True):
                targets[spec.task] = value
        return found


def fetch_tiles(pool: SlidePool, item: SlideItem, tiles: Tiles, caching: TileCaching | None) -> Fetched | None:
    """Fetch what ``tiles`` of a slide need; None when that fails: reading them tries again, and says why."""
    try:
        with pool.reader(item.slide_key, tiles, caching) as reader:
            if isinstance(reader, TileReader) and reader.remote:
                return reader.fetch([tiles])
    except WsiError as error:
        _log.debug("fetching ahead from %s failed: %s", item.id, error)
    return None


def _rejection_reasons(item: SlideItem, tiles: Tiles, failed: Mask) -> list[str]:
    """Why each tile is not given, "" for those that are."""
    boxes = level0_boxes(tiles).round().astype(np.int64).tolist()
    said = "{}: px of the tile at level-0 ({}, {}) to ({}, {}) cannot be decoded"
    return [said.format(item.id, *box) if bad else "" for box, bad in zip(boxes, failed.tolist(), strict=True)]


# ---------------------------------------------------------------- making one


def slide_tiles(
    name: str,
    items: Sequence[SlideItem],
    places: TileSampling,
    specs: Sequence[AnnotationTarget] = (),
    *,
    pool: SlidePool | None = None,
    caching: TileCaching | None = None,
    keep_going: bool = False,
) -> SlideTiles:
    """Tiles of ``items`` at ``places`` with the target of ``specs`` and of the slides themselves.

    Every slide is opened and its annotations are read once. A slide that cannot be is an error, or with ``keep_going``
    one of ``broken``. Raises InputError when no tile is left, two slides have one id, or one task is taught twice.
    """
    _check_sampling(name, items, places, specs)
    pool = pool or SlidePool(KEPT_OPEN)
    prepared: list[_Prepared] = []
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(_OPENING, thread_name_prefix="wsi-mmm-prepare") as threads:
        jobs = [threads.submit(_prepare_slide, pool, item, places, specs, number) for number, item in enumerate(items)]
        for item, job in zip(items, jobs, strict=True):
            try:
                prepared.append(job.result())
            except WsiError as error:
                if not keep_going:
                    threads.shutdown(cancel_futures=True)
                    raise
                broken[item.id] = str(error)
    counts = [len(one.xy) for one in prepared]
    if not sum(counts):
        raise InputError(f"data '{name}': {_no_tiles_message(specs, broken)}")
    tasks = dict.fromkeys([spec.task for spec in specs] + [task for item in items for task in item.targets])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return SlideTiles(
        name,
        tuple(tasks),
        _build_index(prepared),
        places.tile,
        pool,
        caching,
        prepared,
        tuple(specs),
        starts,
        broken,
    )


def _check_sampling(
    name: str, items: Sequence[SlideItem], places: TileSampling, specs: Sequence[AnnotationTarget]
) -> None:
    check_ids(name, [item.id for item in items])
    taught = [spec.task for spec in specs]
    if len(set(taught)) < len(taught):
        raise InputError(f"data '{name}': a task is listed twice among {', '.join(taught)}: keep one")
    if places.by == "objects" and not specs:
        raise ConfigError(f"data '{name}': places by objects need annotations: name a task, or choose by 'grid'")


def check_ids(name: str, ids: Sequence[str]) -> None:
    """Raise InputError when two slides have one id."""
    if len(set(ids)) < len(ids):
        (double, _), *_ = Counter(ids).most_common(1)
        raise InputError(f"data '{name}': two slides are called {double!r}: give them different ids")


def _no_tiles_message(specs: Sequence[AnnotationTarget], broken: Mapping[str, str]) -> str:
    if broken:
        return f"no slide could be prepared; of {next(iter(broken))}: {next(iter(broken.values()))}"
    if not specs:
        return "no tile holds tissue: lower min_tissue"
    advice = "draw regions of a class in the bucket 'use', set complete, or lower min_share"
    return f"no tile tells anything of '{specs[0].task}': look at the dry run of its buckets; {advice}"


def _prepare_slide(
    pool: SlidePool, item: SlideItem, places: TileSampling, specs: Sequence[AnnotationTarget], number: int
) -> _Prepared:
    with pool.slide(item.slide_key) as slide:
        scale = slide.scale(places.mpp)
        make_grid(slide.info, places.mpp, tile=places.tile, overlap=0)  # refuses what is much finer than the slide
        annotated_by_task = _annotations_by_task(slide, item, places, specs)
        xy, labels = _choose_tiles(slide, places, specs, annotated_by_task, number)
        remote = is_far(slide.reader)
    by_tile = {
        spec.task: tile_targets(spec, annotated_by_task[spec.task], xy, places.tile)
        for spec in specs
        if spec.kind in TILE_LEVEL_KINDS and spec.task in annotated_by_task
    }
    drawn = {task: annotated for task, annotated in annotated_by_task.items() if task not in by_tile}
    labels = np.where(labels < 0, np.int32(item.label), labels) if not specs else labels
    return _Prepared(item, scale, xy, labels, by_tile, drawn, remote)


def _annotations_by_task(
    slide: Slide, item: SlideItem, places: TileSampling, specs: Sequence[AnnotationTarget]
) -> dict[str, SlideAnnotations]:
    """Every annotation target's view of the annotations, which are parsed and indexed once."""
    if not specs or item.annotations is None:
        return {}
    values = list(dict.fromkeys(value for spec in specs for value in spec.values))
    radius = tuple(places.dot_um / mpp for mpp in (slide.info.mpp_x or 1.0, slide.info.mpp_y or 1.0))
    index = index_shapes(read_shapes(item.annotations, values), values, dot_radius=(radius[0], radius[1]))
    size, scale = (slide.info.width, slide.info.height), slide.scale(places.mpp)
    return {spec.task: annotations_for_task(spec, index, scale=scale, size=size) for spec in specs}


def read_shapes(uri: str, values: Sequence[str] = ()) -> Shapes:
    """The shapes of an annotation file at a path or URI. Raises AnnotationError, StorageError, NotFound."""
    return parse_shapes(store.read_bytes(uri), store.redact(uri), values)


def _choose_tiles(
    slide: Slide,
    places: TileSampling,
    specs: Sequence[AnnotationTarget],
    annotated_by_task: Mapping[str, SlideAnnotations],
    number: int,
) -> tuple[I64, I32]:
    """Corners int64[n, 2] and balancing classes int32[n] of a slide's items, row-major."""
    leading = specs[0] if specs else None
    annotated = annotated_by_task.get(leading.task) if leading else None
    seed = [places.seed, number]
    if leading is None:
        xy = tissue_places(slide, places)
        labels = np.full(len(xy), UNKNOWN, np.int32)
    elif annotated is None:  # a slide without annotations teaches this task nothing
        return np.zeros((0, 2), np.int64), np.zeros(0, np.int32)
    else:
        if places.by == "objects":
            xy = np.unique(drawn_places(annotated, places.per_slide, places.tile, seed), axis=0)
        else:
            xy = _candidate_tiles(slide, places, annotated)
        keep, labels = choose(leading, annotated, xy, places.tile)
        xy, labels = xy[keep], labels[keep]
    if places.per_slide and len(xy) > places.per_slide:
        some = np.sort(np.random.default_rng(seed).permutation(len(xy))[: places.per_slide])
        xy, labels = xy[some], labels[some]
    turn = np.lexsort((xy[:, 0], xy[:, 1]))
    return xy[turn], labels[turn]


def _candidate_tiles(slide: Slide, places: TileSampling, annotated: SlideAnnotations) -> I64:
    """Tiles of the grid that shapes touch; of a slide that is complete also those with tissue."""
    stride = places.stride or places.tile
    if not annotated.complete or annotated.coding.has_use:
        return grid_places(annotated, places.tile, stride)
    touched = grid_places(annotated, places.tile, stride, touched=True)
    return np.unique(np.concatenate([touched, tissue_places(slide, places)]), axis=0)


def tissue_places(slide: Slide, places: TileSampling) -> I64:
    """Corners int64[n, 2] (x, y), target px, of the tiles of a slide's grid that hold tissue. Raises ConfigError."""
    stride = places.stride or places.tile
    grid = make_grid(slide.info, places.mpp, tile=places.tile, overlap=places.tile - stride)
    return select_tiles(grid, tissue_mask(slide), places.min_tissue)[:, ::-1] * stride


def _build_index(prepared: Sequence[_Prepared]) -> ItemIndex:
    keys: list[str] = []
    groups: list[str] = []
    for one in prepared:
        # Level-0 px: whole ones tell tiles apart unless the slide is finer than what is learnt from it.
        digits = 0 if min(one.scale) >= 1 else 1
        keys += [f"{one.item.id}@{x:.{digits}f},{y:.{digits}f}" for x, y in (one.xy * one.scale).tolist()]
        groups += [one.item.group or one.item.id] * len(one.xy)
    labels = np.concatenate([one.labels for one in prepared])
    return ItemIndex(keys, groups, labels.astype(np.int32))


# ---------------------------------------------------------------- naming slides


def beside(uri: str, pattern: str, *, needed: bool = True) -> str | None:
    """The annotation file of a slide by a pattern with {folder}, {name} (with its ending) and {stem} (without), such as
    "{folder}/{stem}.geojson". None when it is not there and not ``needed``, else InputError."""
    folder, _, name = uri.rpartition("/")
    try:
        found = pattern.format(folder=folder or ".", name=name, stem=PurePosixPath(name).stem)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"annotation pattern {pattern!r}: use {{folder}}, {{name}} and {{stem}} only") from error
    if store.exists(found):
        return found
    if needed:
        raise InputError(f"{store.redact(uri)} has no annotations at {store.redact(found)}: correct the pattern")
    return None


def slides_of_table(
    table: SlideTable,
    *,
    uri: str = "slide",
    mpp: str | None = None,
    annotations: str | None = None,
    root: str = "",
    labels: I32 | None = None,
) -> list[SlideItem]:
    """A slide per row: ``uri``, ``mpp`` and ``annotations`` name columns; ``root`` is put before relative places.
    ``labels`` int32[rows]: what balancing goes by. Raises ManifestError with the row."""
    uris, columns = table.table.column(uri), table.table
    mpps = columns.column(mpp) if mpp else ("",) * len(uris)
    annotation_files = columns.column(annotations) if annotations else ("",) * len(uris)
    found = []
    for row, place in enumerate(uris):
        if not place:
            raise columns.wrong(row, f"column {uri!r} is empty: name the slide's file")
        item = SlideItem(
            table.slides[row], _resolve_under(root, place), _cell_mpp(table, row, mpps[row]),
            _resolve_under(root, annotation_files[row]) if annotation_files[row] else None,
            table.groups[row], table.of(row),
            int(labels[row]) if labels is not None else UNKNOWN,
        )  # fmt: skip
        found.append(item)
    return found


def _resolve_under(root: str, place: str) -> str:
    return place if not root or "://" in place or place.startswith("/") else store.join(root, place)


def _cell_mpp(table: SlideTable, row: int, cell: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ManifestError(str(table.table.wrong(row, f"mpp is {cell!r}: give micrometres per px, such as 0.25")))
    return value


def dry_run_slides(items: Sequence[SlideItem], buckets: Buckets, pool: SlidePool | None = None) -> BucketReport:
    """Report how a bucket table sorts the annotations of slides; areas in mm² where ``pool`` may open the slides."""

    def resolution(item: SlideItem) -> float | None:
        if pool is None:
            return item.mpp
        with pool.slide(item.slide_key) as slide:
            info = slide.info
            return None if info.mpp_x is None or info.mpp_y is None else float(np.sqrt(info.mpp_x * info.mpp_y))

    noted = [(item, item.annotations) for item in items if item.annotations is not None]
    return dry_run(buckets, ((item.id, read_shapes(uri), resolution(item)) for item, uri in noted))
