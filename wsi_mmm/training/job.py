"""A training from its configuration to the model folder that `run` loads."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsi_mmm._version import __version__
from wsi_mmm.errors import ConfigError, ModelError, OutputError
from wsi_mmm.model.checkpoint import build_model, declared_normalisation, load_model, save_model
from wsi_mmm.model.choose import RANDOM, ChosenEncoder, bare_card, choose_encoder
from wsi_mmm.model.encoder import check_tile
from wsi_mmm.model.layers import layers
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.registry import find_entry
from wsi_mmm.storage import store
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.tasks.segment import Segment
from wsi_mmm.training import fit as fitting
from wsi_mmm.training.config import TrainConfig, model_card
from wsi_mmm.training.data.bags import FeatureBagSource
from wsi_mmm.training.data.base import DataContext, DataSource, Expand, Sample, each_by_itself
from wsi_mmm.training.data.buckets import BucketReport
from wsi_mmm.training.data.embedding import FEATURES, check_source
from wsi_mmm.training.data.slide_entries import SlidesEntry
from wsi_mmm.training.data.slides import SlideTiles
from wsi_mmm.training.data.split import missing_labels
from wsi_mmm.training.divide import DataSet, divided
from wsi_mmm.training.fit import QUIET, FitPlan, StepReport, TrainingListener
from wsi_mmm.training.forward import Figures, figures
from wsi_mmm.training.loader import DataFeed, LoadPlan, TrainBatch, batches, make_preprocess, mixed, pictures
from wsi_mmm.training.optim import check_frozen
from wsi_mmm.training.ranks import Ranks, joined, launch_on_dask, total, wait_for_first
from wsi_mmm.training.state import best_weights
from wsi_mmm.training.trackers import TensorBoard, Tracker, open_trackers

MODEL, CHECKPOINTS = "model", "checkpoints"
_TOGETHER = 16  # validation items that are read at once
_SHOWN = 8  # pictures of a data set that TensorBoard shows


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
            known = self._class_names(one)
            numbers, counts = np.unique(one.feed.source.index.labels[one.feed.items], return_counts=True)
            pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
            classes = {known[n] if n < len(known) else "-": count for n, count in pairs if n >= 0}
            parts = {"train": len(one.feed.items), "val": len(one.split.val), "test": len(one.split.test)}
            rows.append({"data": one.name, "tasks": list(one.feed.source.tasks), **parts, "classes": classes})
        return rows

    def warnings(self) -> list[str]:
        """A line for every class that a part has no item of: it is not learnt, or not judged."""
        lines: list[str] = []
        for one in self.data:
            if isinstance(one.feed.source, SlideTiles):
                lines += one.feed.source.unlearnt
            known = self._class_names(one)
            for part, numbers in missing_labels(one.feed.source.index, one.split).items():
                what = ", ".join(known[n] if n < len(known) else str(n) for n in numbers)
                verb = "learnt" if part == "train" else "judged"
                lines.append(f"warning: data '{one.name}' has no {what} in its {part} part: that is not {verb}")
        return lines

    def drawn_classes(self) -> list[str]:
        """A line for every `segment` task: which class is not drawn."""
        lines = []
        for task in self.tasks.values():
            if isinstance(task, Segment):
                hidden = task.info.classes[task.background] if task.background >= 0 else ""
                words = f"'{hidden}' is the background, which is not drawn" if hidden else "every class is drawn"
                lines.append(f"task '{task.info.name}': {words}")
        return lines

    def _class_names(self, data: DataSet) -> tuple[str, ...]:
        """The classes of the first task of a data set."""
        return self.tasks[data.feed.source.tasks[0]].info.classes


@dataclass(frozen=True, slots=True)
class Trained:
    """The outcome of a training: the model folder, metrics of the held-out parts by task, the step that its weights are
    of, how many items were learnt from."""

    model: str = ""
    val: Figures = field(default_factory=dict)
    test: Figures = field(default_factory=dict)
    seconds: float = 0.0
    step: int = 0
    items: int = 0


# ---------------------------------------------------------------- before the first step


def data_context(config: TrainConfig, expand: Expand = each_by_itself) -> DataContext:
    """The context that data sets are opened in; ``expand`` turns words into slides."""
    cards = {card.name: card for card in config.task_cards()}
    return DataContext(cards, config.model.mpp, config.model.learnt_px, expand)


def read_annotations(config: TrainConfig, expand: Expand = each_by_itself) -> dict[str, dict[str, BucketReport]]:
    """Data set -> task -> the report of its bucket table on the annotations; of the data sets that have any."""
    place = data_context(config, expand)
    found = {entry.name: entry.dry_run(place) for entry in config.data if isinstance(entry, SlidesEntry)}
    return {name: tables for name, tables in found.items() if tables}


def prepare(config: TrainConfig, expand: Expand = each_by_itself) -> Prepared:
    """Open every data set, divide them together, build the model. Every mistake of the configuration raises here."""
    model_folder(config)
    place = data_context(config, expand)
    tasks = {name: make_task(card) for name, card in place.tasks.items()}
    feeds = [DataFeed(entry.open(place), entry.batch, weight=entry.weight) for entry in config.data]
    data = divided(feeds, config)
    model = begin_model(config)
    for feed in feeds:
        if isinstance(feed.source, FeatureBagSource) and feed.source.width != model.vector_width:
            raise ConfigError(
                f"data '{feed.source.name}' holds vectors of {feed.source.width} numbers, the model makes "
                f"{model.vector_width}: give the encoder that embedded them, and its weights or model.start"
            )
    check_frozen(model, config.optim)
    _check_bags(config, model, [feed.source for feed in feeds])
    return Prepared(config, model, tasks, data)


def _check_bags(config: TrainConfig, model: MultiTaskModel, sources: Sequence[DataSource]) -> None:
    """ConfigError unless bags of vectors are, and stay, those that the model itself makes of slides."""
    part, bags = config.model, [source for source in sources if isinstance(source, FeatureBagSource)]
    for source in bags:
        check_source(
            source.embedding, source.items[0].uri, f"data '{source.name}'", card=model.card, start=part.start,
            weights=None if part.encoder.weights == "pretrained" else part.encoder.weights, foreign=source.foreign,
        )  # fmt: skip
    depths = 1 + max(layer.depth for layer in layers(model) if layer.name.startswith("encoder."))
    others = [source.name for source in sources if not isinstance(source, FeatureBagSource)]
    if bags and others and config.optim.frozen < depths:
        raise ConfigError(
            f"data '{others[0]}' would change the encoder, and with it the vectors of data '{bags[0].name}': set "
            f"optim.frozen = {depths}, or train the bags apart, with the other model as model.start"
        )


def begin_model(config: TrainConfig) -> MultiTaskModel:
    """The model before its first step: seeded, with the encoder's weights and those of ``model.start``."""
    part = config.model
    weights = None if part.encoder.weights == "pretrained" else part.encoder.weights
    start = load_model(part.start) if part.start else None
    entry = find_entry(part.encoder.name)
    source: ChosenEncoder | None = None
    if entry is not None:
        source = choose_encoder(part.encoder.name, weights) if start is None and weights != RANDOM else None
        weights = RANDOM
    mean, std = part.mean, part.std
    if not (mean and std):
        known = start.card if start else bare_card(entry.recipe) if entry is not None else None
        mean, std = (known.mean, known.std) if known else declared_normalisation(part.encoder.name)
    torch.manual_seed(config.seed)
    model = build_model(model_card(config, mean, std), weights=weights, source=source)
    try:
        check_tile(model.encoder, model.card, part.learnt_px)
    except ModelError as error:
        raise ConfigError(
            f"the encoder {part.encoder.name} cannot take pictures of {part.learnt_px} px: set model.tile_size = 224"
        ) from error
    if start:
        take_over(model, start)
    return model


def take_over(model: MultiTaskModel, other: MultiTaskModel) -> int:
    """Copy the weights of ``other`` that fit by name and shape; return how many. ModelError: another encoder."""
    mine, theirs = model.state_dict(), other.state_dict()
    same = {key: value for key, value in theirs.items() if key in mine and mine[key].shape == value.shape}
    encoder = [key for key in mine if key.startswith("encoder.")]
    missing = [key for key in encoder if key not in same]
    if missing:
        raise ModelError(
            f"model.start: the encoder '{other.card.encoder.name}' of '{other.card.name}' is not that of this model "
            f"('{model.card.encoder.name}'): {len(missing)} of {len(encoder)} weights do not fit; give its encoder: "
            f"name {other.card.encoder.name}, args {json.dumps(other.card.encoder.args)}"
        )
    model.load_state_dict({**mine, **same})
    return len(same)


# ---------------------------------------------------------------- the training


def train(config: TrainConfig, listener: TrainingListener = QUIET, expand: Expand = each_by_itself) -> Trained:
    """Train, judge what was held out, and write ``<out>/model``. The same again goes on from the last checkpoint.

    Under torchrun every rank calls this; rank 0 writes and logs. Raises what `prepare` and `fit` raise.
    """
    model_folder(config)  # a folder that cannot be used is an error before ranks meet
    with joined(config.device) as ranks:
        return train_as(ranks, config, listener, expand)


def train_as(
    ranks: Ranks, config: TrainConfig, listener: TrainingListener = QUIET, expand: Expand = each_by_itself
) -> Trained:
    """`train` among ranks that have met: torchrun lets them meet once."""
    started = time.monotonic()
    prepared = prepare(config, expand)
    if ranks.first:
        listener.say(describe(prepared))
        for line in (*prepared.drawn_classes(), *prepared.warnings()):
            listener.say(line)
    trackers = open_trackers(config.tracking, config.out, facts_of(config)) if ranks.first else ()
    boards = [one for one in trackers if isinstance(one, TensorBoard)] if config.tracking.images else []
    seen: dict[int, Figures] = {}
    try:
        model = fitting.fit(
            prepared.model, prepared.tasks, _make_feed(prepared, ranks, boards),
            plan=fit_plan(config), callbacks=_track_metrics(listener, trackers, seen), ranks=ranks,
        )  # fmt: skip
    finally:
        for tracker in trackers:
            tracker.close()
    done = _finish_training(prepared, model, seen, beat=partial(total, ranks, [1.0])) if ranks.first else Trained()
    wait_for_first(ranks)
    if ranks.first:
        listener.say(f"model {done.model}, the weights of step {done.step}")
        done = replace(done, seconds=time.monotonic() - started)
    return done


def train_on_dask(client: Any, config: TrainConfig, expand: Expand = each_by_itself) -> Trained:
    """`train` with a rank on every worker of a Dask ``client``; see `launch_on_dask`. What the first rank found.

    Workers read the data themselves, and the first one writes: ``out`` and the data must be places that they all see.
    """
    model_folder(config)
    return launch_on_dask(client, partial(train_as, config=config, expand=expand), device=config.device)[0]


def model_folder(config: TrainConfig) -> Path:
    """The folder that the model will be written to. OutputError unless ``out`` is a local folder."""
    if not store.is_local(config.out):
        raise OutputError(
            f"out is {store.redact(config.out)}: the model is written to a local folder; checkpoint.folder may be s3://"
        )
    return store.local_path(store.join(config.out, MODEL))


def checkpoint_folder(config: TrainConfig) -> str:
    """The folder of checkpoints."""
    return config.checkpoint.folder or store.join(config.out, CHECKPOINTS)


def describe(prepared: Prepared) -> str:
    """One line: how much of what."""
    rows = prepared.summary()
    total = {name: sum(row[name] for row in rows) for name in ("train", "val", "test")}
    size = sum(p.numel() for p in prepared.model.parameters()) / 1e6
    parts = ", ".join(f"{count} {name}" for name, count in total.items() if count)
    return f"{len(rows)} data sets ({parts} items), {len(prepared.tasks)} tasks, {size:.1f} M weights"


def fit_plan(config: TrainConfig) -> FitPlan:
    """The loop's plan. What a checkpoint must agree with to be resumed: the data, how it is drawn and changed."""
    facts = facts_of(config)  # without credentials: they are written into checkpoints
    drawn = {name: facts[name] for name in ("data", "split", "sampling", "change", "augment")}
    drawn |= {"size": config.model.learnt_px, "start": facts["model"]["start"]}
    return FitPlan(
        config.steps, config.seed, config.optim, config.strategy,
        weights={task.name: task.weight for task in config.task},
        validate_every=config.validation.every, checkpoint_every=config.checkpoint.every, keep=config.checkpoint.keep,
        best=config.validation.best, lower=config.validation.lower, patience=config.validation.patience,
        not_finite=config.not_finite, folder=checkpoint_folder(config), config=drawn,
    )  # fmt: skip


def _make_feed(prepared: Prepared, ranks: Ranks, boards: Sequence[TensorBoard]) -> fitting.TrainingFeed:
    config = prepared.config
    part = config.sampling
    plan = LoadPlan(
        config.model.learnt_px, policy=part.policy, seed=config.seed, rounds=part.rounds,
        temperature=part.temperature, class_balance=part.class_balance, change=config.change,
        rank=ranks.rank, world=ranks.world, threads=config.threads,
    )  # fmt: skip
    feeds = [one.feed for one in prepared.data]

    def drawn(first: int) -> Iterator[Any]:
        steps = range(first, config.steps)
        made = batches(feeds, prepared.tasks, plan=plan, steps=steps, device=ranks.device)
        made = mixed(made, prepared.tasks) if part.mixed else made
        return _log_first_images(made, first, boards, config) if boards else made

    held = any(len(one.split.val) for one in prepared.data)
    return fitting.TrainingFeed(
        drawn, make_preprocess(config.augment), partial(held_out, prepared, "val") if held else None
    )


def _log_first_images(
    steps: Iterator[tuple[TrainBatch, ...]], first: int, boards: Sequence[TensorBoard], config: TrainConfig
) -> Iterator[tuple[TrainBatch, ...]]:
    """``steps``; pictures of the first of them go to ``boards``, augmented as the model sees them."""
    with closing(steps):  # type: ignore[type-var]  # a generator, whose threads end with it
        for number, found in enumerate(steps):
            for board in boards if number == 0 else ():
                for batch in found:
                    if len(batch) and batch.pixels is not None:
                        seen = pictures(batch, config.augment)[:_SHOWN].clamp(0, 1) * 255.0
                        board.pictures(first, batch.feed, seen.round().byte().permute(0, 2, 3, 1).cpu().numpy())
            yield found


def held_out(prepared: Prepared, part: str) -> Iterator[Sample]:
    """The samples of a part, at most ``validation.items`` of each data set, evenly spread, the same each time."""
    most, size = prepared.config.validation.items, prepared.config.model.learnt_px
    for one in prepared.data:
        numbers = one.split.part(part)
        if most and len(numbers) > most:
            numbers = numbers[np.linspace(0, len(numbers) - 1, most).round().astype(np.int64)]
        for first in range(0, len(numbers), _TOGETHER):
            yield from one.feed.source.read(numbers[first : first + _TOGETHER].tolist(), size)


def _track_metrics(
    listener: TrainingListener, trackers: Sequence[Tracker], seen: dict[int, Figures]
) -> TrainingListener:
    """``listener``, with ``trackers`` informed too; the metrics of validations are kept in ``seen``, by step."""

    def on_step(progress: StepReport) -> None:
        values = {f"loss/{name}": value for name, value in progress.losses.items()}
        values |= {"rate": progress.rate, "steps_per_second": progress.pace, "gradient_norm": progress.norm}
        if progress.step % 10 == 0 or progress.step == 1:
            for tracker in trackers:
                tracker.figures(progress.step, values)
        listener.on_step(progress)

    def on_validation(step: int, found: Figures) -> None:
        seen[step] = found
        for tracker in trackers:
            tracker.figures(step, {f"val/{t}/{m}": v for t, metrics in found.items() for m, v in metrics.items()})
        listener.on_validation(step, found)

    return replace(listener, on_step=on_step, on_validation=on_validation)


def _finish_training(
    prepared: Prepared, model: MultiTaskModel, seen: Mapping[int, Figures], *, beat: Callable[[], object]
) -> Trained:
    """Choose the weights, judge the model, write its folder. ``seen``: metrics of this run's validations, by step."""
    config = prepared.config
    best = best_weights(checkpoint_folder(config)) if config.validation.best else None
    step, weights = best or (config.steps, None)
    if weights:
        model.load_state_dict(weights)
    val = seen[step] if step in seen else figures(model, prepared.tasks, held_out(prepared, "val"), beat=beat)
    test = figures(model, prepared.tasks, held_out(prepared, "test"), beat=beat)
    folder = model_folder(config)
    facts = {
        "trained_with": f"wsi-mmm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "command": config.model.repeat or "wsi-mmm train config.toml, with the configuration below",
        "weights": f"of step {step}" + (f", the best by {config.validation.best}" if weights else ""),
        "configuration": facts_of(config),
        "items": prepared.summary(),
    }
    bags = [one.feed.source for one in prepared.data if isinstance(one.feed.source, FeatureBagSource)]
    if bags:
        facts[FEATURES] = bags[0].embedding.to_json()
    reported: dict[str, Any] = {
        name: {t: {m: round(v, 4) for m, v in metrics.items()} for t, metrics in found.items()}
        for name, found in (("val", val), ("test", test))
        if found
    }
    save_model(model, folder, card=model.card.model_copy(update={"metrics": reported, "data": facts}))
    return Trained(str(folder), val, test, step=step, items=sum(len(one.feed.items) for one in prepared.data))


def facts_of(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values, its places without credentials."""
    return {key: _to_json(value) for key, value in config.model_dump(mode="json").items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, str):
        return store.redact(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, list) else value
