"""Bags: slides as sets of feature vectors that `embed` wrote, or as sets of tissue tiles for learning end to end."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wsi_mmm.cache import CacheEntry
from wsi_mmm.cache.slide_pool import SlidePool, TileCaching
from wsi_mmm.errors import InputError, StorageError, WsiError
from wsi_mmm.outputs.exports import MAX_VALUES, SlideFeatures, check_features, read_attributes, read_features
from wsi_mmm.slides.base import Fetched
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Target
from wsi_mmm.tiles.grid import tile_xy
from wsi_mmm.tiles.stream import is_far, read_tiles
from wsi_mmm.tiles.tile_file import open_dataset
from wsi_mmm.training.data.annotation_targets import UNKNOWN
from wsi_mmm.training.data.base import FetchedItems, ItemIndex, Sample
from wsi_mmm.training.data.embedding import Embedding, check_alike, common_embedding, embedding_of
from wsi_mmm.training.data.slides import (
    KEPT_OPEN,
    SET_MPP,
    SlideItem,
    TileSampling,
    check_ids,
    fetch_tiles,
    map_threaded,
    tissue_places,
)
from wsi_mmm.training.data.tables import SlideTable
from wsi_mmm.types import I32, I64, Grid, Tiles


@dataclass(frozen=True, slots=True)
class BagItem:
    """The features of a slide and what is known of it. ``uri``: a features.zarr, an .h5 as `wsi-mmm export`, TRIDENT
    and CLAM write it, or, where ``grid`` is given, an entry of the feature cache of that grid. ``label``: what
    balancing goes by; ``group``: its patient ("": the slide by itself)."""

    id: str
    uri: str
    group: str = ""
    targets: Mapping[str, Target] = field(default_factory=dict)
    label: int = UNKNOWN
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class Draws:
    """How instances of a bag are drawn: at most ``most`` (0: all), without replacement, by ``seed``. Every slide is
    ``times`` items, each drawn anew: the same item always holds the same instances."""

    most: int = 0
    times: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most < 0 or self.times < 1:
            raise InputError(f"bags of at most {self.most}, {self.times} times a slide: give 0 or more, and 1 or more")

    def chosen(self, count: int, slide: int, time: int) -> I64:
        """Indices of the drawn instances out of ``count``, ascending."""
        if not self.most or count <= self.most:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, slide, time])
        return np.sort(rng.permutation(count)[: self.most])


@dataclass(frozen=True)
class FeatureBagSource:
    """A DataSource of bags of vectors float32[k, D] with level-0 ``xy``; all bags have ``width`` D, and their files say
    that they were made by ``embedding``. ``foreign``: what they do not say is taken to be the model's."""

    name: str
    tasks: tuple[str, ...]
    index: ItemIndex
    items: Sequence[BagItem]
    draws: Draws
    width: int
    embedding: Embedding
    foreign: bool = False

    def read(self, numbers: Sequence[int], size: int) -> list[Sample]:
        """These bags; ``size`` is not looked at. InputError when vectors are of another length than those of the first
        bag, or their file says that they were made otherwise."""
        return [self._read_bag(number) for number in numbers]

    def _read_bag(self, number: int) -> Sample:
        slide, time = divmod(number, self.draws.times)
        item, key = self.items[slide], self.index.keys[number]
        try:
            found = read_item(item)
        except WsiError as error:
            return Sample(key, failed=str(error))
        if found.vectors.shape[1] != self.width:
            text = f"holds vectors of {found.vectors.shape[1]}, {self.items[0].id} of {self.width}"
            raise InputError(f"data '{self.name}': {item.id} {text}: embed all slides with one encoder")
        first = self.items[0]
        made = (item.id, item.uri, embedding_of(found.attributes)), (first.id, first.uri, self.embedding)
        check_alike(*made, f"data '{self.name}': ")
        if not len(found.vectors):
            return Sample(key, failed=f"{item.id}: no tile has features")
        some = self.draws.chosen(len(found.vectors), slide, time)
        vectors = np.ascontiguousarray(found.vectors[some], np.float32)
        return Sample(key, vectors=vectors, xy=found.coords[some], targets=item.targets)


def feature_bags(
    name: str, items: Sequence[BagItem], draws: Draws = Draws(), *, foreign: bool = False
) -> FeatureBagSource:
    """Bags of these slides. The first is read for the length of its vectors, of all others what they say of how they
    were made (of HDF5 files in storage when they are read). Raises InputError, StorageError."""
    check_ids(name, [item.id for item in items])
    if not items:
        raise InputError(f"data '{name}': no slide with features: run wsi-mmm embed first")
    first = read_item(items[0])
    made = [(items[0].id, items[0].uri, embedding_of(first.attributes))]
    made += [one for one in map_threaded(_read_embedding, items[1:]) if one is not None]
    shared = common_embedding(made, f"data '{name}': ")
    index, width = _repeat_index(items, draws.times), first.vectors.shape[1]
    return FeatureBagSource(name, _task_names(items), index, tuple(items), draws, width, shared, foreign)


def _read_embedding(item: BagItem) -> tuple[str, str, Embedding] | None:
    """Id, URI and what a file says without reading its vectors; None where that cannot be: reading it will say."""
    try:
        if item.grid is not None or (_is_h5(item.uri) and not store.is_local(item.uri)):
            return None
        found = _read_h5_attributes(item.uri) if _is_h5(item.uri) else read_attributes(item.uri)
    except WsiError:
        return None  # a damaged file is a failed sample
    return item.id, item.uri, embedding_of(found)


def _is_h5(uri: str) -> bool:
    return uri.lower().endswith((".h5", ".hdf5"))


def bags_of_table(table: SlideTable, pattern: str, *, labels: I32 | None = None, needed: bool = True) -> list[BagItem]:
    """A bag per row; ``pattern`` names its features with {slide}, such as "out/{slide}/features.zarr". A slide without
    them is an InputError, or left out unless ``needed``."""
    found = []
    for row, slide in enumerate(table.slides):
        uri = pattern.replace("{slide}", slide)
        if store.exists(uri):
            label = int(labels[row]) if labels is not None else UNKNOWN
            found.append(BagItem(slide, uri, table.groups[row], table.of(row), label))
        elif needed:
            raise InputError(f"slide {slide!r} has no features at {store.redact(uri)}: run wsi-mmm embed on it")
    return found


def _task_names(items: Sequence[BagItem] | Sequence[SlideItem]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task for item in items for task in item.targets))


def _repeat_index(items: Sequence[BagItem] | Sequence[SlideItem], times: int) -> ItemIndex:
    keys = [item.id if times == 1 else f"{item.id}#{time}" for item in items for time in range(times)]
    groups = [item.group or item.id for item in items for _ in range(times)]
    return ItemIndex(keys, groups, np.repeat(np.array([item.label for item in items], np.int32), times))


# ---------------------------------------------------------------- files of features


def read_item(item: BagItem) -> SlideFeatures:
    """All vectors of a slide. Raises StorageError, NotFound."""
    if item.grid is not None:
        return entry_features(item.uri, item.grid)
    if _is_h5(item.uri):
        return read_h5(item.uri)
    return without_failed(read_features(item.uri), item.uri)


def without_failed(features: SlideFeatures, uri: str) -> SlideFeatures:
    """``features`` at ``uri`` less those of tiles that the run's table beside it lists as failed."""
    tiles = store.join(uri.rstrip("/").rpartition("/")[0], "tiles.parquet")
    if not store.exists(tiles):
        return features
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(tiles)), columns=["x", "y", "failed"])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{store.redact(tiles)} cannot be read ({error}): run wsi-mmm embed again") from error
    rows = zip(*(table[name].to_pylist() for name in ("x", "y", "failed")), strict=True)
    return _leave_out(features, {(x, y) for x, y, bad in rows if bad})


def _leave_out(features: SlideFeatures, failed: Set[tuple[int, int]]) -> SlideFeatures:
    """``features`` less those of the tiles at ``failed`` level-0 (x, y)."""
    good = np.array([tuple(place) not in failed for place in features.coords.tolist()], bool)
    return SlideFeatures(features.vectors[good], features.coords[good], features.attributes)


def read_h5(uri: str) -> SlideFeatures:
    """``features`` [n, D] (or [1, n, D], as some tools write) and ``coords`` [n, 2] of an HDF5 file, and what their
    attributes say."""
    name = store.redact(uri)
    try:
        with h5py.File(io.BytesIO(store.read_bytes(uri)), "r") as file:
            vectors = np.asarray(open_dataset(file, "features", MAX_VALUES), np.float32)
            coords = np.asarray(open_dataset(file, "coords", MAX_VALUES), np.int64)
            attributes = _h5_attributes(file)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{name} is no HDF5 file of features and coords ({error}): export it again") from error
    vectors, coords = vectors.reshape(-1, vectors.shape[-1]), coords.reshape(-1, coords.shape[-1])[:, :2]
    if len(vectors) != len(coords):
        raise StorageError(f"{name} holds {len(vectors)} features and {len(coords)} coords: export it again")
    return check_features(SlideFeatures(vectors, coords, attributes), uri)


def _h5_attributes(file: Any) -> dict[str, Any]:
    """Attributes of the file, of ``features`` and of ``coords``, where ours and those of other tools stand."""
    return {**file.attrs, **file["features"].attrs, **file["coords"].attrs}


def _read_h5_attributes(uri: str) -> dict[str, Any]:
    try:
        with h5py.File(store.local_path(uri), "r") as file:
            return _h5_attributes(file)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{store.redact(uri)} is no HDF5 file of features and coords: export it again") from error


def entry_features(uri: str, grid: Grid) -> SlideFeatures:
    """The vectors of an entry of the feature cache whose tiles are those of ``grid``: of the blocks that have a
    receipt, without tiles that could not be read."""
    entry = CacheEntry(uri, grid.rows, grid.columns, 1)
    array = entry.existing("features")
    if array.shape[:2] != (grid.rows, grid.columns):
        text = f"{array.shape[0]} x {array.shape[1]} tiles, the grid has {grid.rows} x {grid.columns}"
        raise StorageError(
            f"the cache entry at {store.redact(uri)} has {text}: give the mpp, tile and overlap of its run"
        )
    index, failed = _read_block_records(uri)
    vectors = np.asarray(array[:])[index[:, 0], index[:, 1]].astype(np.float32)
    return _leave_out(SlideFeatures(vectors, tile_xy(grid, index), {}), failed)


def _read_block_records(uri: str) -> tuple[I64, set[tuple[int, int]]]:
    """Tiles int64[n, 2] (row, column), row-major, and level-0 (x, y) of those that could not be read."""
    packed, failed = [], set()
    for place in store.list_uris(store.join(uri, "receipts")):
        try:
            record = json.loads(store.read_bytes(place))
            packed.append(np.frombuffer(bytes.fromhex(record["tiles"]), np.int32).reshape(-1, 2))
            failed |= {(int(x), int(y)) for x, y, *_ in record.get("failed") or ()}
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{store.redact(place)} is damaged ({error}): run wsi-mmm embed again") from error
    every = np.concatenate(packed).astype(np.int64) if packed else np.zeros((0, 2), np.int64)
    return every[np.lexsort((every[:, 1], every[:, 0]))], failed


# ---------------------------------------------------------------- tiles


@dataclass(frozen=True)
class TileBagSource:
    """A DataSource of bags of tissue tiles: pixels uint8[k, size, size, 3] with level-0 ``xy``. ``corners`` by slide:
    int64[n, 2] target px of the tiles of ``tile`` px to draw from; ``scales``: level-0 px per target px."""

    name: str
    tasks: tuple[str, ...]
    index: ItemIndex
    items: Sequence[SlideItem]
    draws: Draws
    tile: int
    corners: Sequence[I64]
    scales: Sequence[tuple[float, float]]
    pool: SlidePool
    caching: TileCaching | None
    remote: bool = False

    def fetch(self, numbers: Sequence[int], size: int) -> dict[int, Fetched | None]:
        """Fetch what ``read`` of the same bags needs, by bag; see `SlideSource`."""
        return {
            number: fetch_tiles(
                self.pool, self.items[number // self.draws.times], self._drawn_tiles(number, size), self.caching
            )
            for number in numbers
        }

    def read(self, numbers: Sequence[int], size: int, fetched: FetchedItems | None = None) -> list[Sample]:
        """Squares of ``size`` px round the middles of the drawn tiles. Tiles that cannot be read are left out; a bag of
        which none can be is failed."""
        return [self._read_bag(number, size, (fetched or {}).get(number)) for number in numbers]

    def _drawn_tiles(self, number: int, size: int) -> Tiles:
        slide, time = divmod(number, self.draws.times)
        some = self.draws.chosen(len(self.corners[slide]), slide, time)
        return Tiles(self.corners[slide][some] + (self.tile - size) // 2, size, *self.scales[slide])

    def _read_bag(self, number: int, size: int, fetched: Fetched | None) -> Sample:
        slide = number // self.draws.times
        item, key, tiles = self.items[slide], self.index.keys[number], self._drawn_tiles(number, size)
        try:
            with self.pool.reader(item.slide_key, tiles, self.caching) as reader:
                pixels, failed = read_tiles(reader, tiles, fetched)
        except WsiError as error:
            return Sample(key, failed=str(error))
        if failed.all():
            return Sample(key, failed=f"{item.id}: none of its {len(failed)} tiles can be decoded")
        places = np.floor(tiles.xy[~failed] * self.scales[slide] + 0.5).astype(np.int64)
        return Sample(key, pixels=pixels[~failed], xy=places, targets=item.targets)


def tile_bags(
    name: str,
    items: Sequence[SlideItem],
    places: TileSampling,
    draws: Draws,
    *,
    pool: SlidePool | None = None,
    caching: TileCaching | None = None,
) -> TileBagSource:
    """Bags of ``draws.most`` tissue tiles of each slide. Raises InputError for a slide without tissue, and what opening
    slides raises."""
    check_ids(name, [item.id for item in items])
    if not draws.most:
        raise InputError(f"data '{name}': say how many tiles a bag holds (most), a whole slide fits no memory")
    pool = pool or SlidePool(KEPT_OPEN)

    def look(item: SlideItem) -> tuple[I64, tuple[float, float], bool]:
        with pool.slide(item.slide_key) as slide:
            scale = slide.scale(places.mpp, SET_MPP)
            corners = tissue_places(slide, places)
            if not len(corners):
                raise InputError(f"data '{name}': {item.id} has no tile with tissue: lower min_tissue, or leave it out")
            return corners, scale, is_far(slide.reader)

    corners, scales, remote = zip(*map_threaded(look, items), strict=True)
    index, tasks = _repeat_index(items, draws.times), _task_names(items)
    return TileBagSource(
        name, tasks, index, tuple(items), draws, places.tile, corners, scales, pool, caching, any(remote)
    )
