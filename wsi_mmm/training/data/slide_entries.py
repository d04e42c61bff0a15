"""Data sets of slides as a configuration lists them: tiles by annotations, by tables, of tissue; and bags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from wsi_mmm.cache.slide_pool import SlidePool, TileCaching
from wsi_mmm.errors import ConfigError, InputError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks.targets import Target
from wsi_mmm.tiles.tissue import MIN_TISSUE
from wsi_mmm.training.data import bags, tables
from wsi_mmm.training.data.annotation_targets import MAP_KINDS, TILE_LEVEL_KINDS, AnnotationTarget
from wsi_mmm.training.data.base import ConfigTable, DataContext, DatasetEntry, DataSource, ItemIndex, first_groups
from wsi_mmm.training.data.buckets import BucketReport, Buckets, Rule, same_names
from wsi_mmm.training.data.slides import (
    KEPT_OPEN,
    SlideItem,
    TileSampling,
    beside,
    dry_run_slides,
    slide_tiles,
    slides_of_table,
)
from wsi_mmm.training.data.split import PARTS, split_by_column
from wsi_mmm.training.data.tables import SlideTable, TableTask, balance_labels
from wsi_mmm.types import I32


class TaskOfShapes(ConfigTable):
    """The targets of a task in annotations; see `AnnotationTarget`. ``buckets`` in order, the first that fits decides
    (none: class names are those of the task); ``unmatched``, ``unnamed``: where the rest goes."""

    buckets: tuple[Rule, ...] = ()
    unmatched: str = "ignore"
    unnamed: str = "ignore"
    background: str | None = None
    complete: bool = False
    min_share: float = Field(default=0.5, gt=0, le=1)
    min_visible: float = Field(default=0.3, ge=0, le=1)
    values: tuple[str, ...] = ()

    def spec(self, card: TaskCard) -> AnnotationTarget:
        """The annotation target of the task ``card``. ConfigError for a kind that has no targets in shapes."""
        rules = self.buckets or same_names(card.classes).rules
        buckets = Buckets(card.classes, rules, self.unmatched, self.unnamed)
        return AnnotationTarget(
            card.name, card.kind, buckets, background=self.background, complete=self.complete,
            min_share=self.min_share, min_visible=self.min_visible, values=self.values,
        )  # fmt: skip


class Tiled(DatasetEntry):
    """Tiles of slides. ``by`` "grid" or "objects"; ``per_slide``: at most so many; see `Places`. ``cache``: a folder or
    URI for decoded tiles, shared with runs; ``mpp_override``: micrometres per px of slides, in place of what their
    files say (a column ``mpp`` comes first). ``scene``: the number of the image to read, of files that hold several.
    ``dot_um``: radius of the disc that a point of the annotations stands for (none: that of a cell, 4; 0: points are
    left out)."""

    by: Literal["grid", "objects"] = "grid"
    stride: int = Field(default=0, ge=0)
    per_slide: int = Field(default=0, ge=0)
    min_tissue: float = Field(default=MIN_TISSUE, ge=0, le=1)
    dot_um: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    seed: int = 0
    mpp_override: float | None = Field(default=None, gt=0)
    scene: int | None = Field(default=None, ge=0)
    cache: str | None = None

    def places(self, place: DataContext) -> TileSampling:
        """See `Places`."""
        return TileSampling(
            place.mpp, place.size, self.stride, self.by, self.per_slide, self.min_tissue, self.seed, self.dot_um
        )

    def of_scene(self, items: Sequence[SlideItem]) -> list[SlideItem]:
        """The slides with ``scene``, where their own rows say nothing."""
        return [replace(one, scene=self.scene if one.scene is None else one.scene) for one in items]

    @property
    def caching(self) -> TileCaching | None:
        """The tile cache, measured on each slide."""
        return None if self.cache is None else TileCaching(self.cache)


_WORDS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
OneOrMany = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), WithJsonSchema(_WORDS)
]
"""A word, or several."""


class SlidesEntry(Tiled):
    """Slides with annotations, or their tissue.

    ``slides``: files, folders, patterns, prefixes, manifests, as `wsi-mmm run` takes them. ``task``: one or several, of
    which the first chooses the tiles; ``shapes``: per task, what its annotations mean. ``annotations``: pattern with
    {folder}, {name} and {stem}; "none", for a task that needs no target (reconstruct): tiles with tissue. ``needed``
    False: slides whose annotations are not there are left out. ``group``: a regular expression with one group that
    finds the patient in a slide's id (None: every slide by itself).
    """

    kind: Literal["slides"]
    task: OneOrMany
    slides: OneOrMany
    annotations: str | None = "{folder}/{stem}.geojson"
    needed: bool = True
    shapes: dict[str, TaskOfShapes] = Field(default_factory=dict)
    group: str | None = None

    @field_validator("annotations")
    @classmethod
    def _or_none(cls, value: str | None) -> str | None:
        """TOML has no null."""
        return None if value in ("", "none") else value

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks it is of."""
        return self.task

    def items(self, place: DataContext) -> list[SlideItem]:
        """The slides with their annotation files."""
        specs = place.expand(self.slides)
        ids, found = [name for name, *_ in specs], []
        groups = ids if self.group is None else first_groups(self.group, ids, f"data '{self.name}': group")
        for (name, uri, mpp, scene), group in zip(specs, groups, strict=True):
            if group is None:
                raise InputError(f"data '{self.name}': the group pattern finds no patient in {name!r}")
            annotation_file = None if self.annotations is None else beside(uri, self.annotations, needed=self.needed)
            if annotation_file is None and self.annotations is not None:
                continue
            known: Mapping[str, Target] = dict.fromkeys(self.task) if self.annotations is None else {}
            found.append(SlideItem(name, uri, mpp or self.mpp_override, annotation_file, group, known, scene=scene))
        if not found:
            raise InputError(
                f"data '{self.name}': none of its {len(specs)} slides has annotations at {self.annotations}"
            )
        return self.of_scene(found)

    def specs(self, place: DataContext) -> list[AnnotationTarget]:
        """The annotation target of each task; none without annotations."""
        for name in self.shapes:
            if name not in self.task:
                raise ConfigError(f"data '{self.name}': shapes name the task '{name}', which is not one of its tasks")
        kinds = {name: place.tasks[name].kind for name in self.task}
        for name, kind in kinds.items():
            learns = kind in TILE_LEVEL_KINDS + MAP_KINDS
            if learns != (self.annotations is not None):
                fix = "give annotations" if learns else 'set annotations = "none", or take it from a slide-table'
                raise ConfigError(f"data '{self.name}': task '{name}' of kind '{kind}': {fix}")
        if self.annotations is None:
            return []
        return [self.shapes.get(name, TaskOfShapes()).spec(place.tasks[name]) for name in self.task]

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        specs = self.specs(place)  # a wrong table is an error before files are looked for
        return slide_tiles(self.name, self.items(place), self.places(place), specs, caching=self.caching)

    def dry_run(self, place: DataContext) -> dict[str, BucketReport]:
        """Task -> the report of its bucket table on the annotations."""
        specs, pool = self.specs(place), SlidePool(KEPT_OPEN)
        items = self.items(place) if specs else []
        radius = self.places(place).dot_radius
        return {one.task: dry_run_slides(items, one.buckets, pool, radius) for one in specs}


class TaskColumns(ConfigTable):
    """The columns of a table that hold the targets of a task; see `TableTask`."""

    columns: tuple[str, ...]
    values: dict[str, str] = Field(default_factory=dict)
    separator: str = ";"

    def task(self, card: TaskCard) -> TableTask:
        """The table's task for ``card``."""
        return TableTask(card.name, card.kind, self.columns, card.classes, self.values, self.separator)


class Tabled(ConfigTable):
    """A table with a row per slide. ``truth``: task -> the columns of its targets. ``id``, ``patient``, ``uri``,
    ``mpp``: the columns of its name, its patient, its file and what its px measure; ``root`` is put before relative
    places. ``split``: the column that says train, val, test or nothing (not used); without it patients are drawn."""

    table: str
    id: str = "slide"
    patient: str | None = None
    uri: str = "slide"
    mpp: str | None = None
    split: str | None = None
    root: str = ""
    truth: dict[str, TaskColumns] = Field(min_length=1)

    def read(self, place: DataContext) -> tuple[SlideTable, I32]:
        """The rows, and the class int32[rows] that balancing goes by: of the first task."""
        tasks = [columns.task(place.tasks[name]) for name, columns in self.truth.items()]
        table = tables.slide_table(tables.read_table(self.table), tasks, slide=self.id, group=self.patient)
        return table, balance_labels(tasks[0].kind, table.targets[tasks[0].task])

    def parts(self) -> dict[str, str]:
        """Patient -> train, val, test or "", as the split column says; none without one. ManifestError: wrong words, or
        a patient in two parts."""
        if self.split is None:
            return {}
        table = tables.slide_table(
            tables.read_table(self.table), [], slide=self.id, group=self.patient, split=self.split
        )
        index = ItemIndex(table.slides, table.groups, np.zeros(len(table.slides), np.int32))
        found = split_by_column(index, table.splits)
        named = {table.groups[n]: name for name in PARTS for n in found.part(name).tolist()}
        return dict.fromkeys(table.groups, "") | named

    def items(self, place: DataContext, mpp_override: float | None) -> list[SlideItem]:
        """The slides with their targets; ``mpp_override`` for those whose row names no mpp."""
        table, labels = self.read(place)
        found = slides_of_table(table, uri=self.uri, mpp=self.mpp, root=self.root, labels=labels)
        return [replace(item, mpp=item.mpp or mpp_override) for item in found]


class OfSlideTable(DatasetEntry):
    """A data set whose targets are in a table of slides."""

    slides: Tabled

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks it is of."""
        return tuple(self.slides.truth)


class SlideLabels(OfSlideTable, Tiled):
    """Tissue tiles of slides, each with what a table says of its slide."""

    kind: Literal["slide-table"]

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        items = self.of_scene(self.slides.items(place, self.mpp_override))
        return slide_tiles(self.name, items, self.places(place), caching=self.caching)


class TileBags(OfSlideTable, Tiled):
    """Bags of ``most`` tissue tiles of each slide, for learning end to end; ``times``: draws per slide."""

    kind: Literal["tile-bags"]
    most: int = Field(default=32, ge=1)
    times: int = Field(default=1, ge=1)

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        draws = bags.Draws(self.most, self.times, self.seed)
        items = self.of_scene(self.slides.items(place, self.mpp_override))
        return bags.tile_bags(self.name, items, self.places(place), draws, caching=self.caching)


class FeatureBags(OfSlideTable):
    """Bags of the vectors that ``wsi-mmm embed`` wrote, with what a table says of each slide.

    ``features``: pattern with {slide}, such as "features/{slide}/features.zarr" (or .h5). ``most``: instances drawn of
    each bag (0: all), ``times``: draws per slide. ``needed`` False: slides without features are left out. The vectors
    must be those that the model makes: of the weights, mpp, tile size and overlap that it declares. ``foreign`` True:
    files of other tools, which do not say what they hold, are taken to be so.
    """

    kind: Literal["bags"]
    features: str
    most: int = Field(default=0, ge=0)
    times: int = Field(default=1, ge=1)
    seed: int = 0
    needed: bool = True
    foreign: bool = False

    def open(self, place: DataContext) -> DataSource:
        """The source."""
        table, labels = self.slides.read(place)
        items = bags.bags_of_table(table, self.features, labels=labels, needed=self.needed)
        draws = bags.Draws(self.most, self.times, self.seed)
        return bags.feature_bags(self.name, items, draws, foreign=self.foreign)
