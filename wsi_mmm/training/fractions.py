"""How much data is enough: the same training on several shares of its items, and a table and a plot of the outcome."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import ConfigError, MissingPackage, OptionError
from wsi_mmm.storage import store
from wsi_mmm.training.config import TrainConfig
from wsi_mmm.training.data.base import Expand, each_by_itself
from wsi_mmm.training.fit import QUIET, TrainingListener
from wsi_mmm.training.job import facts_of, model_folder, train_as
from wsi_mmm.training.plot import Panel, draw_panels
from wsi_mmm.training.ranks import Ranks, joined

DONE, TABLE, SUMMARY = "result.json", "fractions.csv", "fractions.json"
_FREE = ("out", "threads", "device", "tracking", "checkpoint")
"""Keys that may differ between a finished training and the requested one."""


@dataclass(frozen=True, slots=True)
class FractionResult:
    """A training that is done: the share of the training items in percent, the seed, the number of items, and the
    metrics of the held-out parts by task."""

    percent: float
    seed: int
    items: int
    val: Mapping[str, Mapping[str, float]]
    test: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Row:
    """A share of the data: the metric of each seed, their mean and standard deviation (0 of one seed)."""

    percent: float
    items: int
    mean: float
    deviation: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """All trainings. ``metric``: "task.metric", of ``part`` ("test" where there is one, else "val"). ``files``: the
    table and the plot; ``notes``: what could not be drawn, and why."""

    metric: str
    part: str
    points: tuple[FractionResult, ...]
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> tuple[Row, ...]:
        """One row per share, from the smallest."""
        found = []
        for percent in sorted({point.percent for point in self.points}):
            mine = [point for point in self.points if point.percent == percent]
            task, _, name = self.metric.partition(".")
            values = tuple(_part_metrics(point, self.part)[task][name] for point in mine)
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            found.append(Row(percent, mine[0].items, float(np.mean(values)), spread, values))
        return tuple(found)


def train_fractions(
    config: TrainConfig,
    percents: Sequence[float],
    *,
    seeds: int = 3,
    metric: str = "",
    listener: TrainingListener = QUIET,
    expand: Expand = each_by_itself,
) -> Curve:
    """Train each share with each seed, in ``<out>/fraction-XX-seed-Y``, skipping what is done; write table and plot.

    Splits stay those of the configuration; the seed decides the weights, the order and which items a share has. Larger
    shares hold the smaller ones of the same seed. Only the first rank returns points. Raises ConfigError, and what
    `train` raises.
    """
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise OptionError("fractions are percents above 0 and up to 100, such as 1,10,50,100")
    if seeds < 1:
        raise OptionError(f"{seeds} seeds: give 1 or more")
    if metric and (fault := config.metric_fault(metric)):
        raise OptionError(f"the metric is {fault}")
    folder = model_folder(config).parent
    points = []
    with joined(config.device) as ranks:
        for percent, number in itertools.product(sorted(set(percents)), range(seeds)):
            one = share_of(config, percent, config.seed + number)
            point = _load_finished(one, percent) or _train_fraction(
                ranks, one, percent, listener=listener, expand=expand
            )
            if point is not None:
                points.append(point)
                curve = _with_metric(tuple(points), metric or config.validation.best)  # a wrong metric ends it here
    return _write_curve(curve, folder) if len(points) == seeds * len(set(percents)) else Curve("", "", tuple(points))


def share_of(config: TrainConfig, percent: float, seed: int) -> TrainConfig:
    """The configuration of one training."""
    out = store.join(config.out, f"fraction-{percent:g}-seed-{seed}")
    part = config.sampling.model_copy(update={"fraction": percent / 100.0})
    held = config.checkpoint
    if held.folder:
        held = held.model_copy(update={"folder": store.join(held.folder, f"fraction-{percent:g}-seed-{seed}")})
    return config.model_copy(update={"out": out, "seed": seed, "sampling": part, "checkpoint": held})


def _train_fraction(
    ranks: Ranks, config: TrainConfig, percent: float, *, listener: TrainingListener, expand: Expand
) -> FractionResult | None:
    """The result; None on all ranks but the first."""
    named = f"{percent:g} % of the items, seed {config.seed} -> {store.redact(config.out)}: "
    done = train_as(ranks, config, replace(listener, say=lambda line: listener.say(named + line)), expand)
    if not done.model:
        return None
    point = FractionResult(percent, config.seed, done.items, done.val, done.test)
    text = json.dumps({"configuration": _what_counts(config), **asdict(point)}, indent=1)
    store.write_bytes(store.join(config.out, DONE), text.encode())
    return point


def _load_finished(config: TrainConfig, percent: float) -> FractionResult | None:
    """The result of an earlier run. ConfigError when that was another training."""
    uri = store.join(config.out, DONE)
    if not store.exists(uri):
        return None
    try:
        found: dict[str, Any] = json.loads(store.read_bytes(uri))
        there = _what_counts(TrainConfig.model_validate(found.pop("configuration")))  # options that are newer: default
        point = FractionResult(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{uri} is damaged; remove it, and that training is done again") from error
    if there != _what_counts(config):
        other = sorted(key for key, value in _what_counts(config).items() if there.get(key) != value)
        raise ConfigError(f"{uri} is of another configuration ({', '.join(other)} differ): choose another out")
    return replace(point, percent=percent)


def _what_counts(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in facts_of(config).items() if key not in _FREE}


# ---------------------------------------------------------------- table and plot


def _part_metrics(point: FractionResult, part: str) -> Mapping[str, Mapping[str, float]]:
    return point.test if part == "test" else point.val


def _with_metric(points: tuple[FractionResult, ...], metric: str) -> Curve:
    """The curve of a metric ("": the first). ConfigError when some training does not give it."""
    part = "test" if all(point.test for point in points) else "val"
    known = [[f"{task}.{name}" for task, found in _part_metrics(p, part).items() for name in found] for p in points]
    if not known[0]:
        raise ConfigError("nothing was held out to judge by: give split.val or split.test above 0")
    chosen = metric or known[0][0]
    if not all(chosen in names for names in known):
        raise ConfigError(f"the {part} part gives no figure '{chosen}'; it gives: {', '.join(known[0])}")
    return Curve(chosen, part, points)


def _write_curve(curve: Curve, folder: Path) -> Curve:
    rows = curve.rows()
    facts = {"metric": curve.metric, "part": curve.part, "rows": [_json_number(asdict(row)) for row in rows]}
    texts = {TABLE: _curve_csv(curve.points), SUMMARY: json.dumps(facts, indent=1) + "\n"}
    for name, text in texts.items():
        store.write_bytes(str(folder / name), text.encode())
    files, notes = [str(folder / name) for name in texts], []
    title = f"{curve.part} part, mean and deviation of {len(rows[0].values)} seeds"
    panel = Panel(title, curve.metric, {"all": {row.percent: row.values for row in rows}})
    try:
        files += [str(path) for path in draw_panels(folder, "fractions", [panel], columns=1)]
    except MissingPackage as error:
        notes.append(str(error))
    return replace(curve, files=tuple(files), notes=tuple(notes))


def _json_number(value: Any) -> Any:
    """JSON knows no NaN: null."""
    if isinstance(value, dict):
        return {key: _json_number(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_number(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _curve_csv(points: Sequence[FractionResult]) -> str:
    """A line per training, part, task and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("percent", "seed", "items", "part", "task", "metric", "value"))
    for point in points:
        for part in ("val", "test"):
            for task, found in _part_metrics(point, part).items():
                for name, value in found.items():
                    writer.writerow((f"{point.percent:g}", point.seed, point.items, part, task, name, f"{value:.6g}"))
    return out.getvalue()
