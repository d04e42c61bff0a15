"""The command that trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from json import loads
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm.cli.console import flags, print_json, say, say_json, table
from wsi_mmm.cli.progress import duration
from wsi_mmm.errors import OptionError

if TYPE_CHECKING:
    from wsi_mmm.training.data.buckets import BucketReport
    from wsi_mmm.training.fit import StepReport, TrainingListener
    from wsi_mmm.training.fractions import Curve
    from wsi_mmm.training.job import Prepared

EVERY = 5.0  # seconds between lines of progress


def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A .toml file; see --example.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value on top of the file, such as optim.rate=1e-3; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open and divide the data, say what there is, learn nothing.")
    ] = False,
    example: Annotated[
        bool,
        typer.Option("--example", help="Print a configuration to begin with: of pictures, or --example slides|bags."),
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of configurations.")] = False,
    fractions: Annotated[
        str | None,
        typer.Option(
            help="Train on shares of the training items, in percent, such as 1,10,50,100: a table and a plot of a "
            "figure against the share. Those that are done are skipped.",
            rich_help_panel="How much data is enough",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Trainings per share.", rich_help_panel="How much data is enough", min=1)
    ] = 3,
    metric: Annotated[
        str,
        typer.Option(
            help="task.metric of the table and the plot. (default: validation.best, or the first)",
            rich_help_panel="How much data is enough",
        ),
    ] = "",
) -> None:
    """Train one encoder for many tasks, from slides, annotations, tables and folders of patches.

    Stopped (Ctrl-C, a crash, a full disk), the same command goes on from the last checkpoint. Under torchrun the tasks
    are spread over the ranks: torchrun --standalone --nproc-per-node 4 -m wsi_mmm train config.toml

    \b
    Examples:
      wsi-mmm train --example > joint.toml
      wsi-mmm train --example slides > slides.toml     (QuPath's annotations; --example bags: a label per slide)
      wsi-mmm train joint.toml --dry-run
      wsi-mmm train joint.toml --set steps=200 --set out=runs/try
      wsi-mmm train joint.toml --fractions 1,10,50,100 --seeds 3
      wsi-mmm run slides/ -m runs/joint/model -o results/
    """
    from wsi_mmm.training import config as words

    if schema:
        print_json(words.json_schema())
        return
    if example:
        from wsi_mmm.training.examples import EXAMPLES

        if config not in (None, *EXAMPLES):
            raise OptionError(f"there is no example '{config}'; choose one of: {', '.join(EXAMPLES)}")
        sys.stdout.write(EXAMPLES[config or "pictures"])
        return
    if config is None:
        raise OptionError("give a configuration; wsi-mmm train --example prints one to begin with")
    from wsi_mmm import api

    if dry_run:
        _show_annotations(api.read_annotations(config, settings or ()))
        _show_data(api.prepare_training(config, settings or ()))
        return
    if fractions is not None:
        percents = _parse_percents(fractions)
        with _training_listener() as listener:
            curve = api.train_fractions(
                config, percents=percents, seeds=seeds, metric=metric, settings=settings or (), listener=listener
            )
        if curve.metric:  # the first rank
            _show_curve(curve)
        return
    with _training_listener() as listener:
        done = api.train(config, settings=settings or (), listener=listener)
    if not done.model:
        return  # not the first rank
    say_json({"model": done.model, "val": done.val, "test": done.test, "seconds": done.seconds})
    for part, found in (("validation", done.val), ("test", done.test)):
        if found:
            table([(t, m, f"{v:.4f}") for t, ms in found.items() for m, v in ms.items()], ("task", part, "figure"))
    say(f"done in {duration(done.seconds)}; wsi-mmm run SLIDES -m {done.model} -o results/")


def _parse_percents(text: str) -> list[float]:
    try:
        return [float(part.strip().removesuffix("%")) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--fractions {text}: give percents with commas, such as 1,10,50,100") from error


def _show_curve(curve: Curve) -> None:
    say_json({"metric": curve.metric, "part": curve.part, "rows": curve.rows(), "files": curve.files})
    rows = [
        (f"{row.percent:g} %", row.items, f"{row.mean:.4f}", f"{row.deviation:.4f}", len(row.values))
        for row in curve.rows()
    ]
    table(rows, ("share", "items", f"{curve.metric} ({curve.part})", "deviation", "seeds"))
    for line in (*curve.files, *curve.notes):
        say(line)


def _show_annotations(found: Mapping[str, Mapping[str, BucketReport]]) -> None:
    for data, tables in found.items():
        for task, one in tables.items():
            say_json({"data": data, "task": task, "annotations": loads(one.as_json())})
            say(f"data '{data}', task '{task}': what becomes of the annotations\n{one.table()}\n")


def _show_data(prepared: Prepared) -> None:
    from wsi_mmm.training.job import describe

    rows = []
    for one in prepared.summary():
        say_json(one)
        classes = ", ".join(f"{name} {count}" for name, count in one["classes"].items())
        rows.append((one["data"], ", ".join(one["tasks"]), one["train"], one["val"], one["test"], classes))
    table(rows, ("data", "tasks", "train", "val", "test", "classes of train"))
    for line in (*prepared.drawn_classes(), *prepared.warnings()):
        say(line)
    say(describe(prepared))


@contextmanager
def _training_listener() -> Iterator[TrainingListener]:
    from wsi_mmm.training.fit import TrainingListener

    if flags.json:
        yield TrainingListener(
            on_step=lambda p: print_json({"step": p.step, "losses": p.losses, "rate": p.rate, "pace": p.pace}),
            on_validation=lambda step, found: print_json({"step": step, "val": found}),
            on_checkpoint=lambda step, uri: print_json({"step": step, "checkpoint": uri}),
        )
    elif sys.stdout.isatty():
        with _draw_bar() as (step, line):
            yield TrainingListener(step, lambda n, found: line(_validation_line(n, found)), say=line)
    else:
        yield TrainingListener(_LossLines(), lambda n, found: say(_validation_line(n, found)), say=say)


class _LossLines:
    """Print losses every few seconds, and items that cannot be read when it first happens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.last = -EVERY

    def __call__(self, progress: StepReport) -> None:
        for why in progress.failed[:1]:
            say(f"warning: left out {why} ({progress.lost} so far)")
        if self.clock() - self.last >= EVERY or progress.step == progress.steps:
            self.last = self.clock()
            say(f"step {progress.step}/{progress.steps} {words(progress)}")
            sys.stdout.flush()


def words(progress: StepReport) -> str:
    """``loss nuclei 0.412 stain 0.100, 2.1 steps/s, 3 min left``."""
    losses = " ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
    left = (progress.steps - progress.step) / max(progress.pace, 1e-9)
    skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
    return f"loss {losses}, {progress.pace:.2f} steps/s, {duration(left)} left{skipped}"


def _validation_line(step: int, found: Mapping[str, Mapping[str, float]]) -> str:
    metrics = "; ".join(f"{t} " + " ".join(f"{m} {v:.3f}" for m, v in ms.items()) for t, ms in found.items())
    return f"validation at step {step}: {metrics}"


@contextmanager
def _draw_bar() -> Iterator[tuple[Callable[[StepReport], None], Callable[[str], None]]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns: Any = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Bars(*columns, refresh_per_second=4) as bars:
        row = bars.add_task("steps", total=None, words="")

        def step(progress: StepReport) -> None:
            for why in progress.failed[:1]:
                bars.print(f"warning: left out {why} ({progress.lost} so far)", markup=False)
            bars.update(row, completed=progress.step, total=progress.steps, words=words(progress))

        yield step, lambda text: bars.print(text, markup=False)
