"""The loop: stopped and resumed at any step to the bit, flat memory, and a name for whatever goes wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from helpers.training import SIZE, batch, tiny
from wsi_mmm.errors import Cancelled, ConfigError, InputError, ModelError, NotFinite, OutputError
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task
from wsi_mmm.training.data.base import Sample
from wsi_mmm.training.fit import EMPTY, QUIET, FitPlan, StepReport, TrainingFeed, TrainingListener, fit
from wsi_mmm.training.forward import figures
from wsi_mmm.training.loader import TrainBatch
from wsi_mmm.training.optim import OptimPlan
from wsi_mmm.training.strategies import StrategyPlan

KINDS = ["classify", "segment"]
PLAN = FitPlan(6, optim=OptimPlan(rate=1e-2, average=0.9, warmup=2), checkpoint_every=2, keep=0)


def feed(
    tasks: Mapping[str, Task], steps: int, change: Callable[[int, TrainBatch], TrainBatch] | None = None
) -> TrainingFeed:
    """One batch for both tasks per step, changed by ``change(step, batch)``."""

    def batches(first: int) -> Iterator[tuple[TrainBatch, ...]]:
        for step in range(first, steps):
            one = batch(tasks, {"t0": "classify", "t1": "segment"}, seed=step, items=2)
            yield (change(step, one) if change else one,)

    return TrainingFeed(batches)


def train(
    plan: FitPlan,
    callbacks: TrainingListener = QUIET,
    change: Callable[[int, TrainBatch], TrainBatch] | None = None,
    validation: Callable[[], list[Sample]] | None = None,
) -> dict[str, Tensor]:
    """The weights that a training of the tiny model ends with."""
    model, tasks = tiny(KINDS)
    fit(model, tasks, replace(feed(tasks, plan.steps, change), validation=validation), plan=plan, callbacks=callbacks)
    assert not model.training
    return {k: v.clone() for k, v in model.state_dict().items()}


def stop_after(step: int) -> TrainingListener:
    """Ctrl-C, once, after ``step`` steps."""

    def on_step(progress: StepReport) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return TrainingListener(on_step=on_step)


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("strategy", ["gradnorm", pytest.param("uncertainty", marks=pytest.mark.slow)])
def test_a_training_that_was_stopped_goes_on_to_the_bit(tmp_path: Path, strategy: str) -> None:
    """Stopped by Ctrl-C after 1, 3 and 4 steps and resumed each time: the weights are those of one run, with moving
    average, dropout and the rule's own weights."""
    plan = replace(PLAN, strategy=StrategyPlan(strategy))
    whole = train(plan)
    parts = replace(plan, folder=str(tmp_path))
    for step in (1, 3, 4):
        with pytest.raises(Cancelled, match=f"stopped after step {step}; checkpoint .*start again"):
            train(parts, stop_after(step))
    assert equal(train(parts), whole)
    assert equal(train(parts), whole)  # there is nothing left to do
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_any_step_can_be_gone_on_from(tmp_path: Path, step: int, kind: Any) -> None:
    """A process that ends without a word (no checkpoint at the end) goes on from its last checkpoint to the bit."""
    plan = replace(PLAN, optim=replace(PLAN.optim, kind=kind), checkpoint_every=1)

    def die(progress: StepReport) -> None:
        if progress.step == step + 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(replace(plan, folder=str(tmp_path)), TrainingListener(on_step=die))
    assert equal(train(replace(plan, folder=str(tmp_path))), train(plan))


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    """Resuming with another rate is refused, naming it; intervals and folders may change."""
    plan = replace(PLAN, steps=2, folder=str(tmp_path))
    train(plan)
    train(replace(plan, checkpoint_every=1, keep=5))
    with pytest.raises(ModelError, match=r"optim\.rate 0\.01 there, 0\.5 here"):
        train(replace(plan, optim=replace(plan.optim, rate=0.5)))


def test_it_learns_and_tells(tmp_path: Path) -> None:
    """On one batch again and again the losses fall; each step is told with its facts; checkpoints at 2, 4, 6."""
    told: list[StepReport] = []
    kept: list[int] = []
    model, tasks = tiny(KINDS)
    one = batch(tasks, {"t0": "classify", "t1": "segment"}, seed=1)
    plan = replace(PLAN, folder=str(tmp_path))
    callbacks = TrainingListener(told.append, on_checkpoint=lambda step, _uri: kept.append(step))
    fit(model, tasks, TrainingFeed(lambda first: ((one,) for _ in range(first, 6))), plan=plan, callbacks=callbacks)
    assert [p.step for p in told] == list(range(1, 7)) and kept == [2, 4, 6]
    assert told[-1].losses["t0"] < told[0].losses["t0"]
    assert told[0].rate == pytest.approx(1e-2 / 3) and all(p.pace > 0 and p.norm > 0 for p in told)


# ---------------------------------------------------------------- what goes wrong
def bad_targets(*steps: int) -> Callable[[int, TrainBatch], TrainBatch]:
    """Values of "t0" that are infinite in these steps."""

    def change(step: int, one: TrainBatch) -> TrainBatch:
        targets = {
            k: torch.full_like(v, torch.inf) if k == "t0" and step in steps else v for k, v in one.targets.items()
        }
        return replace(one, targets=targets)

    return change


def regress(plan: FitPlan, change: Callable[[int, TrainBatch], TrainBatch], told: list[StepReport]) -> MultiTaskModel:
    """A training of values, which can be infinite."""
    model, tasks = tiny(["regress"])

    def batches(first: int) -> Iterator[tuple[TrainBatch, ...]]:
        for step in range(first, plan.steps):
            yield (change(step, batch(tasks, {"t0": "regress"}, seed=step, items=2)),)

    return fit(model, tasks, TrainingFeed(batches), plan=plan, callbacks=TrainingListener(told.append))


def test_nan_ends_training_with_its_name(tmp_path: Path) -> None:
    """NotFinite names step, task and items; the checkpoint before it is there."""
    with pytest.raises(NotFinite, match=r"step 3: the loss of task 't0' is (inf|nan) on 'feed/3/0'"):
        regress(replace(PLAN, folder=str(tmp_path)), bad_targets(3), [])
    assert (tmp_path / "step-00000002.safetensors").exists()


def test_nan_may_be_skipped_up_to_a_limit() -> None:
    """A skipped step moves neither weights nor statistics and is counted; one more than the limit is NotFinite."""
    told: list[StepReport] = []
    plan = replace(PLAN, steps=4, not_finite="skip", skips=1)
    skipped = regress(plan, bad_targets(3), told).state_dict()
    assert [p.skipped for p in told] == [0, 0, 0, 1] and told[-1].losses == {}
    # The schedule's steps are the same, so three steps of it are what four with the last one skipped are.
    model, tasks = tiny(["regress"])
    first = [(batch(tasks, {"t0": "regress"}, seed=step, items=2),) for step in range(3)]
    shorter = fit(model, tasks, TrainingFeed(lambda start: first[start:]), plan=plan).state_dict()
    assert equal(skipped, shorter)
    with pytest.raises(NotFinite, match="2 steps were skipped, 1 may be"):
        regress(plan, bad_targets(1, 2), told)


def test_items_that_cannot_be_read_are_told_and_counted() -> None:
    """A batch without its broken item trains on; the item is named in the step's facts."""
    told: list[StepReport] = []
    train(
        replace(PLAN, steps=3), TrainingListener(told.append),
        lambda step, one: replace(one, failed=("slide-7: the tile is damaged",)) if step == 1 else one,
    )  # fmt: skip
    assert [p.failed for p in told] == [(), ("slide-7: the tile is damaged",), ()]
    assert [p.lost for p in told] == [0, 1, 1] and all(p.losses for p in told)


def test_when_nothing_can_be_read_training_gives_up() -> None:
    """A step without any item moves nothing; twenty in a row are an InputError that says why."""
    told: list[StepReport] = []
    with pytest.raises(InputError, match=rf"in {EMPTY} steps in a row .*gone: no such file"):
        train(
            replace(PLAN, steps=40), TrainingListener(told.append),
            lambda _step, _one: TrainBatch("feed", (), failed=("gone: no such file",)),
        )  # fmt: skip
    assert len(told) == EMPTY - 1 and all(np.isnan(p.norm) for p in told)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_ends_training_in_words(tmp_path: Path) -> None:
    """OutputError in one line; the checkpoint that did fit is whole and goes on elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        plan = replace(PLAN, folder=str(disk))
        with pytest.raises(OutputError, match=r"checkpoint of step \d: .*disk is full") as caught:
            train(plan)
        assert "\n" not in str(caught.value)
        shutil.copytree(disk, tmp_path / "room")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (tmp_path / "room" / "latest.json").exists()
    assert equal(train(replace(PLAN, folder=str(tmp_path / "room"))), train(PLAN))


# ---------------------------------------------------------------- validation
def samples() -> list[Sample]:
    """Four pictures, one of another size, one that cannot be read."""
    rng = np.random.default_rng(3)
    found = []
    for number, side in enumerate((SIZE, SIZE, SIZE - 10, SIZE)):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        targets = {"t0": number % 3, "t1": rng.integers(0, 3, (side, side)).astype(np.int32)}
        found.append(Sample(str(number), pixels, targets=targets, failed="broken" if number == 3 else ""))
    return found


def test_validation_names_its_figures_and_keeps_the_best(tmp_path: Path) -> None:
    """Figures of every task come through quantise and metrics; the best checkpoint is pointed at."""
    seen: dict[int, Any] = {}
    plan = replace(PLAN, validate_every=2, best="t0.accuracy", folder=str(tmp_path))
    train(plan, TrainingListener(on_validation=seen.__setitem__), validation=samples)
    assert sorted(seen) == [2, 4, 6]
    assert all({"t0", "t1"} == set(figures) and 0 <= figures["t0"]["accuracy"] <= 1 for figures in seen.values())
    assert (tmp_path / "best.json").exists()


def test_every_kind_of_answer_is_validated() -> None:
    """Pictures, bags of tiles and of features, and hidden parts of pictures each give their task's figures."""
    model, tasks = tiny(["segment", "reconstruct", "bag-classify"])
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    vectors = rng.normal(size=(5, model.vector_width)).astype(np.float32)
    known = [
        *samples()[:1],
        Sample("tiles", tiles, targets={"t2": 1}),
        Sample("features", vectors=vectors, targets={"t2": 2}),
    ]
    known[0] = replace(known[0], targets={"t0": known[0].targets["t1"]})
    beats: list[int] = []
    found = figures(model.eval(), tasks, known, beat=lambda: beats.append(1))
    assert found.keys() == {"t0", "t1", "t2"} and len(beats) == 3
    assert found["t1"]["psnr"] > 0 and 0 <= found["t2"]["accuracy"] <= 1


def test_validation_changes_nothing() -> None:
    """With it or without, weights end the same."""
    assert equal(train(replace(PLAN, steps=3, validate_every=1), validation=samples), train(replace(PLAN, steps=3)))


def test_training_stops_when_nothing_gets_better() -> None:
    """A metric that cannot rise any more ends training after ``patience`` validations."""
    seen: list[int] = []
    known = [replace(sample, targets={"t0": -1}) for sample in samples()]  # accuracy of nothing: always the same
    plan = replace(PLAN, steps=50, validate_every=1, best="t1.miou", patience=3)
    with pytest.raises(ConfigError, match=r"best is 't1\.miou', which validation does not give"):
        train(plan, validation=lambda: known)
    always = [replace(sample, targets={"t1": np.zeros_like(sample.targets["t1"])}) for sample in samples()]
    name = _first_metric(always)
    train(
        replace(plan, best=f"t1.{name}", optim=OptimPlan(rate=0.0)),
        TrainingListener(on_validation=lambda step, _f: seen.append(step)), validation=lambda: always,
    )  # fmt: skip
    assert 4 <= len(seen) < 50


@pytest.mark.parametrize(
    ("values", "validations", "best"),
    [([math.nan] * 4, 4, None), ([math.nan, math.nan, math.nan, 0.2, 0.1, math.nan, 0.1, 0.3], 7, 4)],
)
def test_a_metric_that_is_not_defined_is_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], validations: int, best: int | None
) -> None:
    """NaN, of held-out items that lack a class, is said; before there is a best it does not count as getting worse."""
    at, said = iter(values), []
    monkeypatch.setattr("wsi_mmm.training.fit.figures", lambda *_, **__: {"t0": {"accuracy": next(at)}})
    plan = replace(PLAN, steps=len(values), validate_every=1, best="t0.accuracy", patience=3, folder=str(tmp_path))
    train(plan, TrainingListener(say=said.append), validation=samples)
    assert len(list(at)) == len(values) - validations
    assert said[0].startswith("warning: t0.accuracy is not defined on the held-out items of step 1")
    pointer = tmp_path / "best.json"
    assert (json.loads(pointer.read_text())["step"] if pointer.exists() else None) == best


def _first_metric(known: list[Sample]) -> str:
    found: dict[int, Any] = {}
    train(
        replace(PLAN, steps=1, validate_every=1),
        TrainingListener(on_validation=found.__setitem__),
        validation=lambda: known,
    )
    return next(iter(found[1]["t1"]))


# ---------------------------------------------------------------- long
@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """Four tasks, 40 micro-batches that come again and again, 600 steps: the process does not grow after the first
    100, checkpoints and validations included."""
    model, tasks = tiny(["classify", "segment", "instances", "regress"])
    kinds = [{"t0": "classify"}, {"t1": "segment"}, {"t2": "instances"}, {"t3": "regress"}]
    items = [batch(tasks, kinds[i % 4], seed=i, items=2) for i in range(40)]

    def batches(first: int) -> Iterator[tuple[TrainBatch, ...]]:
        for step in range(first, 600):
            one = items[step % 40]
            yield (replace(one, failed=("7: damaged",)) if step % 30 == 7 else one,)

    memory: list[int] = []
    process = psutil.Process()

    def on_step(progress: StepReport) -> None:
        if progress.step % 50 == 0:
            memory.append(process.memory_info().rss)

    plan = FitPlan(600, optim=OptimPlan(average=0.99), validate_every=50, checkpoint_every=50, folder=str(tmp_path))
    validation = [replace(sample, targets={"t0": 1, "t1": sample.targets["t1"]}) for sample in samples()]
    callbacks = TrainingListener(on_step=on_step)
    fit(model, tasks, TrainingFeed(batches, validation=lambda: validation), plan=plan, callbacks=callbacks)
    assert len(memory) == 12
    assert max(memory[2:]) - memory[1] < 8 << 20, [m >> 20 for m in memory]


@pytest.mark.slow
def test_sigterm_of_a_process_leaves_a_checkpoint(tmp_path: Path) -> None:
    """A process told to end by its batch system writes its state and says so in one line."""
    here = Path(__file__)
    code = (
        f"import sys; sys.path[:0] = [{str(here.parent.parent)!r}]\n"
        "import os, signal, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('t', {str(here)!r})\n"
        "t = importlib.util.module_from_spec(spec)\n"
        "sys.modules['t'] = t\n"
        "spec.loader.exec_module(t)\n"
        "def on_step(p):\n"
        "    if p.step == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "try: t.train(t.replace(t.PLAN, folder=sys.argv[1]), t.TrainingListener(on_step=on_step))\n"
        "except t.Cancelled as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("training was stopped after step 3; checkpoint ") and done.stdout.count("\n") == 1
    assert (tmp_path / "step-00000003.safetensors").exists()
