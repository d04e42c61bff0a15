"""Slides as a DataSource: items are tiles, read as `run` reads them, with targets from annotations, tables or both."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, TypeVar

import numpy as np

from wsi_mmm.annotations import Shapes, clip_to_slide, parse_shapes, read_annotation_file
from wsi_mmm.cache.slide_pool import SlideKey, SlidePool, TileCaching
from wsi_mmm.errors import ConfigError, InputError, WsiError
from wsi_mmm.slides import Slide
from wsi_mmm.slides.base import Fetched, TileReader
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Target
from wsi_mmm.tiles.grid import level0_boxes, make_grid
from wsi_mmm.tiles.stream import is_far, read_tiles
from wsi_mmm.tiles.tissue import MIN_TISSUE, select_tiles, tissue_mask
from wsi_mmm.training.data.annotation_targets import (
    TILE_LEVEL_KINDS,
    UNKNOWN,
    AnnotationTarget,
    SlideAnnotations,
    annotations_for_task,
    choose,
    drawn_places,
    grid_places,
    map_targets,
    tile_targets,
)
from wsi_mmm.training.data.base import FetchedItems, ItemIndex, Sample
from wsi_mmm.training.data.buckets import DOT_UM, BucketReport, Buckets, SlideObjects, dry_run
from wsi_mmm.training.data.raster import index_shapes
from wsi_mmm.training.data.tables import SlideTable
from wsi_mmm.types import I32, I64, Tiles

T = TypeVar("T")
R = TypeVar("R")
_log = logging.getLogger(__name__)
_OPENING = 4  # slides prepared at a time
KEPT_OPEN = 16  # slides that stay open while nobody reads them
SET_MPP = "set mpp_override = 0.25 in its [[data]], or give a table of slides with a column 'mpp'"
"""The way out for a slide of a training that does not say its resolution."""
DOT_PX = 4.0  # least radius, target px, of the disc that a point stands for by default: maps show it
_LEAST_DOT_PX = 2.0  # px of maps are two target px wide


@dataclass(frozen=True, slots=True)
class SlideItem:
    """A slide to learn from. ``mpp`` overrides what it says; ``scene``: the number of the image to read, of a file that
    holds several; ``annotations``: path or URI of its GeoJSON or ASAP XML;
    ``group``: its patient ("": the slide by itself); ``targets``: what is known of the whole slide, by task, and
    ``label`` the class of it that balancing goes by where tiles have none."""

    id: str
    uri: str
    mpp: float | None = None
    annotations: str | None = None
    group: str = ""
    targets: Mapping[str, Target] = field(default_factory=dict)
    label: int = UNKNOWN
    scene: int | None = None

    @property
    def slide_key(self) -> SlideKey:
        """The slide to open."""
        return SlideKey(self.uri, self.mpp, scene=self.scene)


@dataclass(frozen=True, slots=True)
class TileSampling:
    """How tiles of ``tile`` px at ``mpp`` are chosen as items.

    ``by`` "grid": of a grid from the slide's corner with ``stride`` (0: the tile's side), those that the first
    annotation target can learn from; without annotation targets, those with at least ``min_tissue`` tissue. ``by``
    "objects": ``per_slide`` tiles drawn round the objects of the first annotation target, every class alike.
    ``per_slide``: at most so many (0: all), drawn by ``seed``. ``dot_um``: radius of the disc that a point stands for
    (0: points are left out; None: that of a cell, `dot_radius`)."""

    mpp: float
    tile: int = 256
    stride: int = 0
    by: Literal["grid", "objects"] = "grid"
    per_slide: int = 0
    min_tissue: float = MIN_TISSUE
    seed: int = 0
    dot_um: float | None = None

    def __post_init__(self) -> None:
        if self.tile < 1 or not 0 <= self.stride <= self.tile:
            raise ConfigError(f"tile {self.tile}, stride {self.stride}: give 1 or more, the stride up to the tile")
        if self.by not in ("grid", "objects") or (self.by == "objects" and self.per_slide < 1):
            raise ConfigError("places are chosen by 'grid', or by 'objects' with per_slide of 1 or more")
        if 0 < self.dot_radius < _LEAST_DOT_PX * self.mpp:
            least = f"give {_LEAST_DOT_PX * self.mpp:g} or more, or 0 to leave points out"
            raise ConfigError(f"dot_um is {self.dot_radius:g}: discs so small are lost at {self.mpp:g} mpp: {least}")

    @property
    def dot_radius(self) -> float:
        """Micrometres of the disc that a point stands for; 0: points are left out."""
        return max(DOT_UM, DOT_PX * self.mpp) if self.dot_um is None else self.dot_um


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A slide with the corners ``xy`` int64[n, 2] (target px) of its tiles, their classes for balancing, the targets of
    tile tasks by item, the annotations of the tasks whose targets are drawn when they are read, and per task how many
    objects each class has."""

    item: SlideItem
    scale: tuple[float, float]
    xy: I64
    labels: I32
    by_tile: Mapping[str, Sequence[Target]]
    annotated_by_task: Mapping[str, SlideAnnotations]
    remote: bool
    objects: Mapping[str, Counter[int]]

    def tiles(self, local: I64, tile: int, size: int) -> Tiles:
        """Return the squares of ``size`` px round the middles of its items ``local``, tiles of ``tile`` px."""
        return Tiles(self.xy[local] + (tile - size) // 2, size, *self.scale)


@dataclass(frozen=True)
class SlideTiles:
    """A DataSource of tiles of slides; see `slide_tiles`."""

    name: str
    tasks: tuple[str, ...]
    index: ItemIndex
    tile: int
    pool: SlidePool
    caching: TileCaching | None
    slides: Sequence[_Prepared]
    specs: Sequence[AnnotationTarget]
    starts: I64  # int64[slides + 1]: numbers of each slide's first item
    unlearnt: tuple[str, ...] = ()  # a line for each class of a tile task whose objects are in no item

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

        Targets per px and boxes are those of the square; labels and numbers those of the item's own tile, whatever
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
        boxes = level0_boxes(tiles).round().astype(np.int64).tolist()
        text = "{}: px of the tile at level-0 ({}, {}) to ({}, {}) cannot be decoded"
        return [
            Sample(key, failed=text.format(slide.item.id, *boxes[n]))
            if failed[n]
            else Sample(key, pixels=pixels[n], targets=targets[n])
            for n, key in enumerate(keys)
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


# ---------------------------------------------------------------- making one


def slide_tiles(
    name: str,
    items: Sequence[SlideItem],
    places: TileSampling,
    specs: Sequence[AnnotationTarget] = (),
    *,
    pool: SlidePool | None = None,
    caching: TileCaching | None = None,
) -> SlideTiles:
    """Tiles of ``items`` at ``places`` with the targets of ``specs`` and of the slides themselves.

    Every slide is opened and its annotations are read once. Raises what that raises, and InputError when no tile is
    left, two slides have one id, or a task is listed twice.
    """
    check_ids(name, [item.id for item in items])
    listed = [spec.task for spec in specs]
    if len(set(listed)) < len(listed):
        raise InputError(f"data '{name}': a task is listed twice among {', '.join(listed)}: keep one")
    if places.by == "objects" and not specs:
        raise ConfigError(f"data '{name}': places by objects need annotations: name a task, or choose by 'grid'")
    pool = pool or SlidePool(KEPT_OPEN)

    def prepare(numbered: tuple[int, SlideItem]) -> _Prepared:
        return _prepare_slide(pool, numbered[1], places, specs, numbered[0])

    prepared = map_threaded(prepare, list(enumerate(items)))
    counts = [len(one.xy) for one in prepared]
    if not sum(counts):
        raise InputError(f"data '{name}': {_no_tiles_message(specs)}")
    tasks = dict.fromkeys([*listed, *(task for item in items for task in item.targets)])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = _build_index(prepared)
    lines = _unlearnt_classes(name, prepared, specs, ", or per_slide left these out" if places.per_slide else "")
    return SlideTiles(name, tuple(tasks), index, places.tile, pool, caching, prepared, tuple(specs), starts, lines)


def _unlearnt_classes(
    name: str, prepared: Sequence[_Prepared], specs: Sequence[AnnotationTarget], more: str
) -> tuple[str, ...]:
    """A line for each class of a tile task that has objects but is the target of no tile."""
    lines = []
    for spec in specs:
        if spec.kind not in ("classify", "multilabel"):
            continue
        counts = sum((one.objects[spec.task] for one in prepared if spec.task in one.objects), Counter[int]())
        seen = {label for one in prepared for label in _classes_of(one.by_tile.get(spec.task, ()))}
        lines += [
            f"warning: data '{name}': {count} objects of '{spec.buckets.labels[label]}' are the target of no tile of "
            f"'{spec.task}': min_share is {spec.min_share:g}, and they cover less, or another class hides them{more}"
            for label, count in sorted(counts.items())
            if label not in seen
        ]
    return tuple(lines)


def _classes_of(targets: Sequence[Target]) -> set[int]:
    """The classes that some of these targets of tiles say are there."""
    if not len(targets):
        return set()
    table = np.array(targets)
    found = table if table.ndim == 1 else np.flatnonzero((table == 1).any(axis=0))
    return {int(label) for label in np.unique(found) if label >= 0}


def map_threaded(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``function`` of each item, some at a time: what opens slides mostly waits. An error cancels the rest."""
    with ThreadPoolExecutor(_OPENING, thread_name_prefix="wsi-mmm-prepare") as threads:
        return list(threads.map(function, items))


def check_ids(name: str, ids: Sequence[str]) -> None:
    """Raise InputError when two slides have one id."""
    if len(set(ids)) < len(ids):
        (double, _), *_ = Counter(ids).most_common(1)
        raise InputError(f"data '{name}': two slides are called {double!r}: give them different ids")


def _no_tiles_message(specs: Sequence[AnnotationTarget]) -> str:
    if not specs:
        return "no tile holds tissue: lower min_tissue"
    advice = "draw regions of a class in the bucket 'use', set complete, or lower min_share"
    return f"no tile tells anything of '{specs[0].task}': look at the dry run of its buckets; {advice}"


def _prepare_slide(
    pool: SlidePool, item: SlideItem, places: TileSampling, specs: Sequence[AnnotationTarget], number: int
) -> _Prepared:
    with pool.slide(item.slide_key) as slide:
        scale = slide.scale(places.mpp, SET_MPP)
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
    objects = {
        task: Counter(annotated.coding.code[annotated.coding.code >= 0].tolist())
        for task, annotated in annotated_by_task.items()
    }
    return _Prepared(item, scale, xy, labels, by_tile, drawn, remote, objects)


def _annotations_by_task(
    slide: Slide, item: SlideItem, places: TileSampling, specs: Sequence[AnnotationTarget]
) -> dict[str, SlideAnnotations]:
    """Every annotation target's view of the annotations, which are parsed and indexed once."""
    if not specs or item.annotations is None:
        return {}
    values = list(dict.fromkeys(value for spec in specs for value in spec.values))
    radius = tuple(places.dot_radius / mpp for mpp in (slide.info.mpp_x or 1.0, slide.info.mpp_y or 1.0))
    there = clip_to_slide(read_shapes(item.annotations, values), slide.info.width, slide.info.height)
    if off := there.describe_off():
        _log.warning("%s: %s", item.id, off.replace("in it", f"in {store.redact(item.annotations)}"))
    index = index_shapes(there.shapes, values, dot_radius=(radius[0], radius[1]))
    size, scale = (slide.info.width, slide.info.height), slide.scale(places.mpp)
    found = {spec.task: annotations_for_task(spec, index, scale=scale, size=size) for spec in specs}
    for spec in specs if places.dot_um is None and index.dots else ():
        count = int((found[spec.task].coding.code[-index.dots :] >= 0).sum())
        if count and spec.kind in TILE_LEVEL_KINDS:
            raise InputError(
                f"{item.id}: {count} points have a class of '{spec.task}', and a point covers no tile: draw regions, "
                "put their class into the bucket 'drop', or give dot_um (a radius in micrometres; 0: without points)"
            )
    return found


def read_shapes(uri: str, values: Sequence[str] = ()) -> Shapes:
    """The shapes of an annotation file at a path or URI. Raises AnnotationError, StorageError, NotFound."""
    return parse_shapes(read_annotation_file(uri), store.redact(uri), values)


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
    elif annotated is None:  # a slide without annotations has no target of this task
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
    root: str = "",
    labels: I32 | None = None,
) -> list[SlideItem]:
    """A slide per row: ``uri`` and ``mpp`` name columns; ``root`` is put before relative places. ``labels``
    int32[rows]: what balancing goes by. Raises ManifestError with the row."""
    uris, columns = table.table.column(uri), table.table
    mpps = columns.column(mpp) if mpp else ("",) * len(uris)
    found = []
    for row, place in enumerate(uris):
        if not place:
            raise columns.wrong(row, f"column {uri!r} is empty: name the slide's file")
        file = place if not root or "://" in place or place.startswith("/") else store.join(root, place)
        label = int(labels[row]) if labels is not None else UNKNOWN
        measured = _cell_mpp(table, row, mpps[row])
        found.append(SlideItem(table.slides[row], file, measured, None, table.groups[row], table.of(row), label))
    return found


def _cell_mpp(table: SlideTable, row: int, cell: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise table.table.wrong(row, f"mpp is {cell!r}: give micrometres per px, such as 0.25")
    return value


def dry_run_slides(
    items: Sequence[SlideItem], buckets: Buckets, pool: SlidePool, dot_um: float = DOT_UM
) -> BucketReport:
    """Report how a bucket table sorts the annotations of slides; areas in mm² where slides know their resolution."""

    def objects(item: SlideItem, uri: str) -> SlideObjects:
        with pool.slide(item.slide_key) as slide:
            info = slide.info
        mpp = None if info.mpp_x is None or info.mpp_y is None else float(np.sqrt(info.mpp_x * info.mpp_y))
        return SlideObjects(item.id, read_shapes(uri), (info.width, info.height), mpp)

    return dry_run(
        buckets, (objects(item, item.annotations) for item in items if item.annotations is not None), dot_um=dot_um
    )
