"""The training loop: the same on one process or many ranks, stopped and resumed at any step.

A step is: its micro-batches, the strategy (forward, losses, gradients of all ranks), one update of the weights. Items
that cannot be read are counted and reported (`StepReport.failed`), NaN is NotFinite or a skipped step, a full disk
OutputError with the earlier checkpoint whole, another rank's end ClusterError, Ctrl-C Cancelled after a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from wsi_mmm.errors import Cancelled, ConfigError, InputError, NotFinite
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task
from wsi_mmm.training import optim, state
from wsi_mmm.training.forward import Figures, Preprocess, TrainingContext, figures, plain
from wsi_mmm.training.optim import OptimPlan
from wsi_mmm.training.ranks import ALONE, Norms, Ranks, first_message, spread, total, wait_for_first
from wsi_mmm.training.state import CheckpointStore, Training
from wsi_mmm.training.strategies import Strategy, StrategyInputs, StrategyPlan, make_strategy

if TYPE_CHECKING:
    from wsi_mmm.training.data.base import Sample
    from wsi_mmm.training.loader import TrainBatch

EMPTY = 20  # steps in a row in which no item can be read before training gives up
_OPTIM, _STRATEGY = OptimPlan(), StrategyPlan()


@dataclass(frozen=True, slots=True)
class FitPlan:
    """How a training goes.

    ``weights`` of the tasks' losses (1 where absent). ``validate_every``, ``checkpoint_every``: steps (0: only at the
    end, and with a ``folder``). ``best``: "task.metric" that is to rise (``lower``: fall); ``patience``: validations
    without a better one after which training stops (0: never). ``not_finite``: "error", or "skip" up to ``skips`` steps
    in all. ``folder``: where checkpoints go ("": nowhere); ``keep``: how many besides the best. ``config``: further
    facts that a checkpoint must agree with to be resumed (data, model).
    """

    steps: int
    seed: int = 0
    optim: OptimPlan = _OPTIM
    strategy: StrategyPlan = _STRATEGY
    weights: Mapping[str, float] = field(default_factory=dict)
    validate_every: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    best: str = ""
    lower: bool = False
    patience: int = 0
    not_finite: Literal["error", "skip"] = "error"
    skips: int = 10
    folder: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingFeed:
    """``batches(first)``: this rank's micro-batches of each step, from step ``first`` on. ``look``: turns a batch's
    pixels into the encoder's input. ``validation()``: the held-out samples, anew each time."""

    batches: Callable[[int], Iterable[tuple[TrainBatch, ...]]]
    look: Preprocess = plain
    validation: Callable[[], Iterable[Sample]] | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """Facts of a step that was done. ``losses`` by task, of this step; ``rate`` of the heads; ``pace``: steps/s since
    the start or resumption; ``norm`` of the gradients before clipping (NaN: the step moved nothing); ``failed``:
    "key: why" of this rank's items that could not be read; ``lost`` and ``skipped``: items and steps so far."""

    step: int
    steps: int
    losses: Mapping[str, float]
    rate: float
    pace: float
    norm: float
    failed: tuple[str, ...]
    lost: int
    skipped: int


@dataclass(frozen=True, slots=True)
class TrainingListener:
    """Callbacks, called on rank 0: after a step; after a validation (step, metrics by task); after a checkpoint (step,
    URI); with the lines of text that `job.train` has to say."""

    on_step: Callable[[StepReport], None] = lambda _: None
    on_validation: Callable[[int, Figures], None] = lambda *_: None
    on_checkpoint: Callable[[int, str], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None


QUIET = TrainingListener()


@dataclass(slots=True)
class _Run:
    """The state that the functions of the loop share."""

    context: TrainingContext
    norms: Norms
    feed: TrainingFeed
    plan: FitPlan
    callbacks: TrainingListener
    ranks: Ranks
    strategy: Strategy
    training: Training
    checkpoints: CheckpointStore | None
    stop: threading.Event = field(default_factory=threading.Event)
    since: tuple[int, float] = (0, 0.0)
    empty: int = 0


def fit(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    feed: TrainingFeed,
    *,
    plan: FitPlan,
    callbacks: TrainingListener = QUIET,
    ranks: Ranks = ALONE,
) -> MultiTaskModel:
    """Train ``model`` (which is changed) and return it in evaluation mode, with its averaged weights if they are kept.

    A checkpoint in ``plan.folder`` is resumed; the result is that of a run without the stop, to the bit on a CPU.
    """
    run = _start_run(model, tasks, feed, plan=plan, callbacks=callbacks, ranks=ranks)
    training = run.training
    with contextlib.closing(run.norms), _stop_on_signal(run.stop), contextlib.closing(_iter_steps(run)) as rounds:
        if run.checkpoints is not None:
            state.resume(run.checkpoints, training)
        run.since = (training.step, time.monotonic())
        for batches in rounds:
            progress = _train_step(run, batches)
            training.step += 1
            if ranks.first:
                callbacks.on_step(progress)
            last = training.step == plan.steps
            better = _run_validation(run) if _is_due(plan.validate_every, training.step, last) else False
            finished = last or (plan.patience > 0 and training.stale >= plan.patience)
            if better or _is_due(plan.checkpoint_every, training.step, finished):
                _save_checkpoint(run, better)
            if finished:
                break
    if training.average is not None:
        model.load_state_dict(training.average)
    return model.eval()


def identity(plan: FitPlan, tasks: Mapping[str, Task], model: MultiTaskModel) -> dict[str, Any]:
    """The facts that must agree for a checkpoint to be resumed: all that changes the weights, flat, as JSON values."""
    facts = {f"optim.{k}": v for k, v in dataclasses.asdict(plan.optim).items()}
    facts |= {f"strategy.{k}": v for k, v in dataclasses.asdict(plan.strategy).items()}
    facts |= {f"weights.{name}": plan.weights.get(name, 1.0) for name in tasks}
    facts |= {f"config.{k}": v for k, v in plan.config.items()}
    card = model.card.model_dump(mode="json", include={"encoder", "squeezer", "decoder", "neck", "bag", "mean", "std"})
    facts |= {f"model.{k}": v for k, v in card.items()}
    facts |= {f"task.{card.name}": card.model_dump(mode="json") for card in model.card.tasks if card.name in tasks}
    return facts | {"steps": plan.steps, "seed": plan.seed, "not_finite": plan.not_finite, "tasks": list(tasks)}


# ------------------------------------------------------------------------------------------- the parts of the loop
def _start_run(
    model: MultiTaskModel,
    tasks: Mapping[str, Task],
    feed: TrainingFeed,
    *,
    plan: FitPlan,
    callbacks: TrainingListener,
    ranks: Ranks,
) -> _Run:
    model.to(device=ranks.device)
    model.to(memory_format=torch.channels_last)
    optim.begin(model, plan.optim)
    strategy = make_strategy(plan.strategy, tuple(tasks))
    everything = [*model.parameters(), *model.buffers()]
    spread(ranks, [t.data for t in everything], [0] * len(everything))  # all begin with rank 0's weights
    learning = optim.learners(model, strategy.own, plan.optim)
    average = optim.first_average(model) if plan.optim.average else None
    scale = optim.first_scale(plan.optim.precision)
    training = Training(model, optim.Optimiser(learning, plan.optim, ranks), strategy.own, average, scale)
    norms = Norms(model, ranks)
    context = TrainingContext(model, tasks, feed.look, optim.autocast_type(plan.optim.precision), norms)
    checkpoints = CheckpointStore(plan.folder, identity(plan, tasks, model), plan.keep) if plan.folder else None
    return _Run(context, norms, feed, plan, callbacks, ranks, strategy, training, checkpoints)


def _iter_steps(run: _Run) -> Generator[tuple[TrainBatch, ...], None, None]:
    """Each step's micro-batches, until the last. Cancelled, after a checkpoint, when some rank received a signal."""
    if run.training.step >= run.plan.steps:
        return
    found = run.feed.batches(run.training.step)
    with contextlib.ExitStack() as stack:
        if isinstance(found, Generator):
            stack.enter_context(contextlib.closing(found))  # its threads end with the loop
        for batches in found:
            if total(run.ranks, [float(run.stop.is_set())])[0]:
                uri = _save_checkpoint(run, False)
                kept = f"; checkpoint {uri}: start again to go on" if uri else ""
                raise Cancelled(f"training was stopped after step {run.training.step}{kept}")
            yield batches


def _train_step(run: _Run, batches: tuple[TrainBatch, ...]) -> StepReport:
    """One optimiser step, or none where NaN is skipped or nothing could be read."""
    plan, training = run.plan, run.training
    failed = tuple(line for batch in batches for line in batch.failed)
    lost, places = total(run.ranks, [float(len(failed)), float(len(batches))])
    training.lost += int(lost)
    factor = optim.factor(plan.optim, training.step, plan.steps)
    moving = tuple(batch.to(run.ranks.device) for batch in batches)
    inputs = StrategyInputs(run.context, moving, plan.weights, training.step, run.ranks, training.scale.value)
    losses: dict[str, float] = {}
    norm: float | None = None
    run.norms.begin()
    try:
        losses = run.strategy(inputs)
        norm = optim.ready(training.optimiser.learning, plan.optim, training.scale) if losses else None
        run.norms.settle(int(places) * run.ranks.world)  # mixed micro-batches leave places that nobody has
    except NotFinite as error:
        _skip_step(run, error)
    else:
        _update_weights(run, norm, factor, bool(losses))
        _nothing_read(run, failed, bool(losses))
    first, start = run.since
    pace = (training.step + 1 - first) / max(1e-9, time.monotonic() - start)
    rate = plan.optim.rate * factor
    shown = float("nan") if norm is None else norm
    return StepReport(training.step + 1, plan.steps, losses, rate, pace, shown, failed, training.lost, training.skipped)


def _update_weights(run: _Run, norm: float | None, factor: float, found: bool) -> None:
    """Step the optimiser, follow with the average, set the next scale; ``norm`` None: the gradients are not used."""
    training = run.training
    if norm is None:
        training.optimiser.clear()
    else:
        training.optimiser.step(factor)
        if training.average is not None:
            optim.follow(training.average, run.context.model, step=training.step, decay=run.plan.optim.average)
    if found:
        training.scale = training.scale.after(overflow=norm is None)


def _skip_step(run: _Run, error: NotFinite) -> None:
    """As if the step had not been; NotFinite when that is not wanted, or too often."""
    run.norms.drop()
    run.training.optimiser.clear()
    run.training.skipped += 1
    if run.plan.not_finite == "error":
        raise error
    if run.training.skipped > run.plan.skips:
        raise NotFinite(f"{error}; {run.training.skipped} steps were skipped, {run.plan.skips} may be") from error


def _nothing_read(run: _Run, failed: tuple[str, ...], found: bool) -> None:
    run.empty = 0 if found else run.empty + 1
    if run.empty >= EMPTY:
        why = first_message(run.ranks, failed[0] if failed else "") or "the batches serve none of the tasks"
        raise InputError(f"in {run.empty} steps in a row there was nothing to learn from: {why}")


def _is_due(every: int, step: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _run_validation(run: _Run) -> bool:
    """Compute metrics of the averaged model on rank 0; return True if the named one is the best so far."""
    if run.feed.validation is None:
        return False
    ranks, training = run.ranks, run.training
    value = 0.0
    if ranks.first:
        with optim.swapped(run.context.model, training.average):
            found = figures(
                run.context.model, run.context.tasks, run.feed.validation(), beat=partial(total, ranks, [1.0])
            )
        run.callbacks.on_validation(training.step, found)
        value = _selected_metric(run.plan.best, found) if run.plan.best else 0.0
    wait_for_first(ranks)
    return bool(run.plan.best) and _is_better(run, total(ranks, [value])[0])


def _selected_metric(best: str, found: Figures) -> float:
    task, _, metric = best.partition(".")
    if metric not in found.get(task, {}):
        known = ", ".join(f"{t}.{m}" for t, metrics in found.items() for m in metrics)
        raise ConfigError(f"best is '{best}', which validation does not give; it gives: {known or 'nothing'}")
    return found[task][metric]


def _is_better(run: _Run, value: float) -> bool:
    training, lower = run.training, run.plan.lower
    if math.isnan(value) and training.best is None:
        if run.ranks.first:
            run.callbacks.say(
                f"warning: {run.plan.best} is not defined on the held-out items of step {training.step}: do they have "
                "every class?"
            )
        return False
    better = training.best is None or (value < training.best if lower else value > training.best)
    training.best, training.stale = (value, 0) if better else (training.best, training.stale + 1)
    return better


def _save_checkpoint(run: _Run, better: bool) -> str:
    if run.checkpoints is None:
        return ""
    uri = state.write(run.checkpoints, run.training, ranks=run.ranks, best=better)
    if run.ranks.first:
        run.callbacks.on_checkpoint(run.training.step, uri)
    return uri


@contextlib.contextmanager
def _stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set ``stop``, which ends training after the step; a second one ends it at once. Does
    nothing in threads other than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
