"""The data sets of a training, divided together into training, validation and test items."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wsi_mmm.errors import ConfigError
from wsi_mmm.training.config import SplitPart, TrainConfig
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.entries import Pictured
from wsi_mmm.training.data.slide_entries import OfSlideTable
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
        hashes: dict[str, str] = {}
        for one in data:
            used = np.concatenate([one.split.part(name) for name in PARTS])
            found = picture_hashes(one.feed.source, used, config.model.learnt_px)
            hashes |= {f"{one.name}/{key}": value for key, value in found.items()}
        _check_parts([(one.name, one.feed.source.index) for one in data], splits, hashes)
    return data


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
    parts = [split.part(name) for name in PARTS]
    found = [Split(*(part[(part >= a) & (part < b)] - a for part in parts)) for a, b in itertools.pairwise(ends)]
    _check_parts(indexes, found)
    return found


def _check_parts(
    indexes: Sequence[tuple[str, ItemIndex]], splits: Sequence[Split], hashes: Mapping[str, str] | None = None
) -> None:
    """InputError for a group, an item or (by ``hashes``) a picture that is in two parts."""
    whole = [_prefix_keys(name, index) for name, index in indexes]
    members = {name: [(i, one.part(name)) for i, one in zip(whole, splits, strict=True)] for name in PARTS}
    check_leaks(members, hashes)


def _prefix_keys(name: str, index: ItemIndex) -> ItemIndex:
    """``index`` with keys that tell data sets apart: two folders may both have a 1.png."""
    return replace(index, keys=[f"{name}/{key}" for key in index.keys])


def fixed_parts(config: TrainConfig, indexes: Sequence[tuple[str, ItemIndex]] = ()) -> dict[str, str]:
    """Group -> train, val, test or "" (not used), as tables with a split column and paths of pictures (of the data sets
    in ``indexes``) say. ConfigError: two disagree."""
    found: dict[str, str] = {}
    opened = dict(indexes)
    for entry in config.data:
        parts: Mapping[str, str] = {}
        if isinstance(entry, OfSlideTable):
            parts = entry.slides.parts()
        elif isinstance(entry, Pictured) and entry.name in opened:
            parts = entry.fixed(opened[entry.name])
        for group, part in parts.items():
            if found.setdefault(group, part) != part:
                raise ConfigError(f"data '{entry.name}' puts '{group}' into '{part}', other data elsewhere")
    return found


def _draw_split(whole: ItemIndex, fixed: Mapping[str, str], part: SplitPart) -> Split:
    """The parts that tables name, and those of the other groups, drawn as ``part`` says."""
    named = np.array([fixed.get(group) for group in whole.groups], object)
    free = np.flatnonzero([word is None for word in named])
    found = _random_split(whole.part(free), part)
    return Split(*(np.sort(np.concatenate([free[found.part(n)], np.flatnonzero(named == n)])) for n in PARTS))


def _random_split(index: ItemIndex, part: SplitPart) -> Split:
    if not len(index):
        none = np.zeros(0, np.int64)
        return Split(none, none, none)
    if not part.folds:
        return split_items(index, shares=(1.0 - part.val - part.test, part.val, part.test), seed=part.seed)
    if part.fold >= part.folds:
        raise ConfigError(f"split.fold is {part.fold} of {part.folds}: folds count from 0")
    return folds(index, part.folds, test=part.test, seed=part.seed)[part.fold]


def _training_items(feed: DataFeed, split: Split, config: TrainConfig) -> I64:
    """The training items, or a fraction of them."""
    part = config.sampling
    spared = bool(part.fraction_of) and feed.source.name not in part.fraction_of
    if part.fraction >= 1 or spared or not len(split.train):
        return split.train
    chosen = fraction_of(feed.source.index.labels[split.train], part.fraction, seed=config.seed)
    learnt: I64 = split.train[chosen]
    return learnt
