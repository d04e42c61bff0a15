"""A training from its configuration to the model folder that `run` loads."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from wsi_mmm import __version__
from wsi_mmm.errors import ModelError, OutputError, RecipeError
from wsi_mmm.model.checkpoint import build_model, declared_normalisation, load_model, save_model
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.slides import store
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.train import fit as fitting
from wsi_mmm.train.config import TrainConfig, model_card
from wsi_mmm.train.data.base import Index, Sample
from wsi_mmm.train.data.entry import Expand, Place, each_by_itself
from wsi_mmm.train.data.split import Split, check_leaks, folds, split_items
from wsi_mmm.train.fit import Callbacks, FitPlan, Progress
from wsi_mmm.train.loader import Feed, LoadPlan, batches, look_of
from wsi_mmm.train.policy import fraction_of
from wsi_mmm.train.ranks import Ranks, joined
from wsi_mmm.train.trackers import Tracker, open_trackers
from wsi_mmm.train.validate import Figures, figures
from wsi_mmm.types import I64

MODEL, CHECKPOINTS = "model", "checkpoints"
_TOGETHER = 16  # validation items that are read at once


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set that was opened and divided."""

    feed: Feed
    split: Split

    @property
    def name(self) -> str:
        """Its name."""
        return self.feed.source.name


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a training needs, with nothing learnt yet."""

    config: TrainConfig
    model: MultiTaskModel
    tasks: Mapping[str, Task]
    data: tuple[DataSet, ...]

    def summary(self) -> list[dict[str, Any]]:
        """Per data set: its tasks, how many items each part has, and of which classes the training part is."""
        rows = []
        for one in self.data:
            index = one.feed.source.index
            numbers, counts = np.unique(index.labels[one.feed.items], return_counts=True)
            task = self.config.task[[t.name for t in self.config.task].index(one.feed.source.tasks[0])]
            names = {n: task.classes[n] if 0 <= n < len(task.classes) else "-" for n in numbers.tolist()}
            classes = {names[n]: c for n, c in zip(numbers.tolist(), counts.tolist(), strict=True) if n >= 0}
            parts = {"train": len(one.feed.items), "val": len(one.split.val), "test": len(one.split.test)}
            rows.append({"data": one.name, "tasks": list(one.feed.source.tasks), **parts, "classes": classes})
        return rows


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training leaves: the model folder, and figures of the held-out parts, by task."""

    model: str
    val: Figures
    test: Figures
    seconds: float


@dataclass(frozen=True, slots=True)
class Listener:
    """What a user sees of a training: every step, every validation, every checkpoint, and lines."""

    on_step: Callable[[Progress], None] = lambda _: None
    on_validation: Callable[[int, Figures], None] = lambda *_: None
    on_checkpoint: Callable[[int, str], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None


QUIET = Listener()


# ---------------------------------------------------------------- before the first step


def place_of(config: TrainConfig, expand: Expand = each_by_itself) -> Place:
    """What data sets are opened for; ``expand`` says which slides words stand for."""
    cards = {card.name: card for card in config.task_cards()}
    return Place(cards, config.model.mpp, config.model.tile_size, expand)


def prepare(config: TrainConfig, expand: Expand = each_by_itself) -> Prepared:
    """Open every data set, divide them together, build the model. Raises what is wrong before anything is learnt."""
    place = place_of(config, expand)
    tasks = {name: make_task(card) for name, card in place.tasks.items()}
    feeds = [Feed(entry.open(place), entry.batch, weight=entry.weight) for entry in config.data]
    splits = divide([(feed.source.name, feed.source.index) for feed in feeds], config)
    data = tuple(
        DataSet(Feed(feed.source, feed.batch, _learnt(feed, split, config), feed.weight), split)
        for feed, split in zip(feeds, splits, strict=True)
    )
    for one in data:
        if not len(one.feed.items):
            raise RecipeError(
                f"data '{one.name}' has no item to learn from: give it more groups, or a smaller split.val"
            )
    return Prepared(config, begin_model(config), tasks, data)


def divide(indexes: Sequence[tuple[str, Index]], config: TrainConfig) -> list[Split]:
    """A split per data set, drawn over all of them together: a patient of two data sets is on one side in both.

    InputError when a picture or a group is on two sides all the same.
    """
    part = config.split
    keys = [f"{name}/{key}" for name, index in indexes for key in index.keys]
    groups = [str(group) for _, index in indexes for group in index.groups]
    labels = [index.labels + np.int32(1000 * n) for n, (_, index) in enumerate(indexes)]
    whole = Index(keys, groups, np.concatenate(labels).astype(np.int32))
    if part.folds:
        if part.fold >= part.folds:
            raise RecipeError(f"split.fold is {part.fold} of {part.folds}: folds count from 0")
        split = folds(whole, part.folds, test=part.test, seed=part.seed)[part.fold]
    else:
        split = split_items(whole, shares=(1.0 - part.val - part.test, part.val, part.test), seed=part.seed)
    ends = np.cumsum([0, *(len(index) for _, index in indexes)]).tolist()
    found = [
        Split(*(_between(split.part(name), a, b) for name in ("train", "val", "test")))
        for a, b in itertools.pairwise(ends)
    ]
    parts = {
        name: [(index, one.part(name)) for (_, index), one in zip(indexes, found, strict=True)]
        for name in ("train", "val", "test")
    }
    check_leaks(parts)
    return found


def _between(numbers: I64, low: int, high: int) -> I64:
    part: I64 = numbers[(numbers >= low) & (numbers < high)] - low
    return part


def _learnt(feed: Feed, split: Split, config: TrainConfig) -> I64:
    """The training items, or a fraction of them."""
    if config.sampling.fraction >= 1 or not len(split.train):
        return split.train
    chosen = fraction_of(feed.source.index.labels[split.train], config.sampling.fraction, seed=config.seed)
    learnt: I64 = split.train[chosen]
    return learnt


def begin_model(config: TrainConfig) -> MultiTaskModel:
    """The model before its first step: seeded, with the encoder's weights and those of ``model.start``."""
    part = config.model
    weights = None if part.encoder.weights == "pretrained" else part.encoder.weights
    mean, std = (part.mean, part.std) if part.mean and part.std else _normalisation(config)
    torch.manual_seed(config.seed)
    model = build_model(model_card(config, mean, std), weights=weights)
    if part.start:
        take_over(model, load_model(part.start))
    return model


def _normalisation(config: TrainConfig) -> tuple[Any, Any]:
    if config.model.start:
        card = load_model(config.model.start).card
        return card.mean, card.std
    return declared_normalisation(config.model.encoder.name)


def take_over(model: MultiTaskModel, other: MultiTaskModel) -> int:
    """Copy every weight of ``other`` whose name and shape ``model`` has; how many. ModelError: another encoder."""
    mine, theirs = model.state_dict(), other.state_dict()
    same = {key: value for key, value in theirs.items() if key in mine and mine[key].shape == value.shape}
    encoder = [key for key in mine if key.startswith("encoder.")]
    missing = [key for key in encoder if key not in same]
    if missing:
        raise ModelError(
            f"model.start: the encoder '{other.card.encoder.name}' of '{other.card.name}' is not that of this model "
            f"('{model.card.encoder.name}'): {len(missing)} of {len(encoder)} weights do not fit; give the same encoder"
        )
    model.load_state_dict({**mine, **same})
    return len(same)


# ---------------------------------------------------------------- the training


def train(config: TrainConfig, listener: Listener = QUIET, expand: Expand = each_by_itself) -> Trained:
    """Train, judge what was held out, and write ``<out>/model``. The same again goes on from the last checkpoint.

    Under torchrun every rank calls this; rank 0 writes and speaks. Raises what `prepare` and `fit` raise.
    """
    started = time.monotonic()
    with joined(config.device) as ranks:
        prepared = prepare(config, expand)
        listener.say(describe(prepared))
        trackers = open_trackers(config.tracking, config.out, facts_of(config)) if ranks.first else ()
        try:
            model = fitting.fit(
                prepared.model, prepared.tasks, _feed(prepared, ranks),
                plan=fit_plan(config), callbacks=_callbacks(listener, trackers), ranks=ranks,
            )  # fmt: skip
            if not ranks.first:
                return Trained("", {}, {}, time.monotonic() - started)
            return _finish(prepared, model, listener, time.monotonic() - started)
        finally:
            for tracker in trackers:
                tracker.close()


def describe(prepared: Prepared) -> str:
    """One line: how much of what."""
    rows = prepared.summary()
    total = {name: sum(row[name] for row in rows) for name in ("train", "val", "test")}
    size = sum(p.numel() for p in prepared.model.parameters()) / 1e6
    parts = ", ".join(f"{count} {name}" for name, count in total.items() if count)
    return f"{len(rows)} data sets ({parts} items), {len(prepared.tasks)} tasks, {size:.1f} M weights"


def fit_plan(config: TrainConfig) -> FitPlan:
    """The loop's plan. What a checkpoint must agree with to be resumed: the data, how it is drawn and changed."""
    drawn = config.model_dump(mode="json", include={"data", "split", "sampling", "change", "augment"})
    drawn |= {"size": config.model.tile_size}
    return FitPlan(
        config.steps, config.seed, config.optim, config.strategy,
        weights={task.name: task.weight for task in config.task},
        validate_every=config.validation.every, checkpoint_every=config.checkpoint.every, keep=config.checkpoint.keep,
        best=config.validation.best, lower=config.validation.lower, patience=config.validation.patience,
        not_finite=config.not_finite, folder=store.join(config.out, CHECKPOINTS), config=drawn,
    )  # fmt: skip


def _feed(prepared: Prepared, ranks: Ranks) -> fitting.Feed:
    config = prepared.config
    part = config.sampling
    plan = LoadPlan(
        config.model.tile_size, policy=part.policy, seed=config.seed, rounds=part.rounds,
        temperature=part.temperature, class_balance=part.class_balance, change=config.change,
        rank=ranks.rank, world=ranks.world, threads=config.threads,
    )  # fmt: skip
    feeds = [one.feed for one in prepared.data]

    def drawn(first: int) -> Iterator[Any]:
        return batches(feeds, prepared.tasks, plan=plan, steps=range(first, config.steps), device="cpu")

    held = any(len(one.split.val) for one in prepared.data)
    return fitting.Feed(drawn, look_of(config.augment), partial(held_out, prepared, "val") if held else None)


def held_out(prepared: Prepared, part: str) -> Iterator[Sample]:
    """The samples of a part, at most ``validation.items`` of each data set, evenly spread, the same each time."""
    most, size = prepared.config.validation.items, prepared.config.model.tile_size
    for one in prepared.data:
        numbers = one.split.part(part)
        if most and len(numbers) > most:
            numbers = numbers[np.linspace(0, len(numbers) - 1, most).round().astype(np.int64)]
        for first in range(0, len(numbers), _TOGETHER):
            yield from one.feed.source.read(numbers[first : first + _TOGETHER].tolist(), size)


def _callbacks(listener: Listener, trackers: Sequence[Tracker]) -> Callbacks:
    def on_step(progress: Progress) -> None:
        values = {f"loss/{name}": value for name, value in progress.losses.items()}
        values |= {"rate": progress.rate, "steps_per_second": progress.pace, "gradient_norm": progress.norm}
        if progress.step % 10 == 0 or progress.step == 1:
            for tracker in trackers:
                tracker.figures(progress.step, values)
        listener.on_step(progress)

    def on_validation(step: int, found: Figures) -> None:
        for tracker in trackers:
            tracker.figures(step, {f"val/{t}/{m}": v for t, metrics in found.items() for m, v in metrics.items()})
        listener.on_validation(step, found)

    return Callbacks(on_step, on_validation, listener.on_checkpoint)


def _finish(prepared: Prepared, model: MultiTaskModel, listener: Listener, seconds: float) -> Trained:
    """Judge the model as it is and write its folder."""
    found = {part: figures(model, prepared.tasks, held_out(prepared, part)) for part in ("val", "test")}
    config = prepared.config
    told: dict[str, Any] = {name: _rounded(value) for name, value in found.items() if value}
    facts = {
        "trained_with": f"wsi-mmm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "command": "wsi-mmm train config.toml, with the configuration below",
        "configuration": facts_of(config),
        "items": prepared.summary(),
        "seconds": round(seconds),
    }
    card = model.card.model_copy(update={"metrics": told, "data": facts})
    if not store.is_local(config.out):
        raise OutputError(f"the model folder is written to a local folder, not {store.redact(config.out)}")
    folder = store.local_path(store.join(config.out, MODEL))
    save_model(model, folder, card=card)
    listener.say(f"model {folder}")
    return Trained(str(folder), found["val"], found["test"], seconds)


def _rounded(found: Figures) -> Figures:
    return {task: {name: round(value, 4) for name, value in metrics.items()} for task, metrics in found.items()}


def facts_of(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values, its places without credentials."""
    return {key: _plain(value) for key, value in config.model_dump(mode="json").items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return store.redact(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
