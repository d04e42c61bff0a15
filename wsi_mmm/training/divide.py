"""The data sets of a training, divided together: what is learnt from, what chooses the model, what judges it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wsi_mmm.errors import ConfigError
from wsi_mmm.training.config import SplitPart, TrainConfig
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.entries import DataEntry, Pictured
from wsi_mmm.training.data.slide_entries import FeatureBags, SlideLabels, TileBags
from wsi_mmm.training.data.split import PARTS, Split, check_leaks, folds, forbid_test, picture_hashes, split_items
from wsi_mmm.training.loader import DataFeed
from wsi_mmm.training.policy import fraction_of
from wsi_mmm.types import I64


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set that was opened and divided."""

    feed: DataFeed
    split: Split

    @property
    def name(self) -> str:
        """Its name."""
        return self.feed.source.name


def divided(feeds: Sequence[DataFeed], config: TrainConfig) -> tuple[DataSet, ...]:
    """``feeds`` with the items that each may learn from. ConfigError, InputError: what cannot be divided."""
    splits = divide([(feed.source.name, feed.source.index) for feed in feeds], config)
    data = tuple(
        DataSet(replace(feed, numbers=_training_items(feed, split, config)), split)
        for feed, split in zip(feeds, splits, strict=True)
    )
    _check_parts(data, config)
    return data


def _check_parts(data: Sequence[DataSet], config: TrainConfig) -> None:
    for one in data:
        if not len(one.feed.items):
            raise ConfigError(
                f"data '{one.name}' has no item to learn from: give it more groups, or a smaller split.val"
            )
        forbid_test(one.split, one.feed.items)
    part = config.validation
    if (part.best or part.patience) and not any(len(one.split.val) for one in data):
        raise ConfigError("validation.best and patience want held-out items: give split.val above 0, or more groups")
    if config.split.pictures:
        size = config.model.learnt_px
        sources = [(one.feed.source, np.concatenate([one.split.part(name) for name in PARTS])) for one in data]
        hashes = {
            f"{source.name}/{key}": value
            for source, numbers in sources
            for key, value in picture_hashes(source, numbers, size).items()
        }
        check_leaks(
            _items_by_part([_prefix_keys(one.name, one.feed.source.index) for one in data], [o.split for o in data]),
            hashes,
        )


def divide(indexes: Sequence[tuple[str, ItemIndex]], config: TrainConfig) -> list[Split]:
    """A split per data set, drawn over all of them together: a patient of two data sets is on one side in both.

    InputError when a picture or a group is on two sides all the same.
    """
    keys = [key for name, index in indexes for key in _prefix_keys(name, index).keys]
    groups = [str(group) for _, index in indexes for group in index.groups]
    labels = [index.labels + np.int32(1000 * n) for n, (_, index) in enumerate(indexes)]
    whole = ItemIndex(keys, groups, np.concatenate(labels).astype(np.int32))
    split = _draw_split(whole, fixed_parts(config, indexes), config.split)
    ends = np.cumsum([0, *(len(index) for _, index in indexes)]).tolist()
    found = [Split(*(_hash_range(split.part(name), a, b) for name in PARTS)) for a, b in itertools.pairwise(ends)]
    check_leaks(_items_by_part([_prefix_keys(name, index) for name, index in indexes], found))
    return found


def _prefix_keys(name: str, index: ItemIndex) -> ItemIndex:
    """``index`` with keys that tell data sets apart: two folders may both have a 1.png."""
    return replace(index, keys=[f"{name}/{key}" for key in index.keys])


def fixed_parts(config: TrainConfig, indexes: Sequence[tuple[str, ItemIndex]] = ()) -> dict[str, str]:
    """Group -> train, val, test or "" (not used), as tables with a split column and paths of pictures (of the data sets
    in ``indexes``) say. ConfigError: two disagree."""
    found: dict[str, str] = {}
    opened = dict(indexes)
    for entry in config.data:
        for group, part in _fixed_parts(entry, opened.get(entry.name)).items():
            if found.setdefault(group, part) != part:
                raise ConfigError(f"data '{entry.name}' puts '{group}' into '{part}', other data elsewhere")
    return found


def _fixed_parts(entry: DataEntry, index: ItemIndex | None) -> Mapping[str, str]:
    if isinstance(entry, SlideLabels | TileBags | FeatureBags):
        return entry.slides.parts()
    return entry.fixed(index) if isinstance(entry, Pictured) and index is not None else {}


def _draw_split(whole: ItemIndex, fixed: Mapping[str, str], part: SplitPart) -> Split:
    """What tables say, and the groups that none names drawn as ``part`` says."""
    said = np.array([fixed.get(group) for group in whole.groups], object)
    free = np.flatnonzero([word is None for word in said])
    some = free.tolist()
    inner = ItemIndex([whole.keys[n] for n in some], [whole.groups[n] for n in some], whole.labels[free])
    found = _random_split(inner, part)
    return Split(*(np.sort(np.concatenate([free[found.part(n)], np.flatnonzero(said == n)])) for n in PARTS))


def _random_split(index: ItemIndex, part: SplitPart) -> Split:
    if not len(index):
        none = np.zeros(0, np.int64)
        return Split(none, none, none)
    if not part.folds:
        return split_items(index, shares=(1.0 - part.val - part.test, part.val, part.test), seed=part.seed)
    if part.fold >= part.folds:
        raise ConfigError(f"split.fold is {part.fold} of {part.folds}: folds count from 0")
    return folds(index, part.folds, test=part.test, seed=part.seed)[part.fold]


def _items_by_part(indexes: Sequence[ItemIndex], splits: Sequence[Split]) -> dict[str, list[tuple[ItemIndex, I64]]]:
    return {name: [(index, one.part(name)) for index, one in zip(indexes, splits, strict=True)] for name in PARTS}


def _hash_range(numbers: I64, low: int, high: int) -> I64:
    part: I64 = numbers[(numbers >= low) & (numbers < high)] - low
    return part


def _training_items(feed: DataFeed, split: Split, config: TrainConfig) -> I64:
    """The training items, or a fraction of them."""
    part = config.sampling
    spared = bool(part.fraction_of) and feed.source.name not in part.fraction_of
    if part.fraction >= 1 or spared or not len(split.train):
        return split.train
    chosen = fraction_of(feed.source.index.labels[split.train], part.fraction, seed=config.seed)
    learnt: I64 = split.train[chosen]
    return learnt
