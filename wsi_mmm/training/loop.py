"""The training loop: flat, resumable, and talking only through ``say``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.memory import keep_memory
from wsi_mmm.model.checkpoint import load_tensors, save_tensors
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task
from wsi_mmm.training import step as stepping
from wsi_mmm.training.compose import Batch, Composer
from wsi_mmm.training.sampler import Mix, Shelf, draw

CHECKPOINT = "checkpoint.safetensors"
MIX = Mix()
Say = Callable[[str], None]
Evaluate = Callable[[MultiTaskModel], str]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast. ``average``: decay of the weights' moving average; ``weights`` of the tasks' losses."""

    steps: int
    seed: int = 0
    mix: Mix = MIX
    rate: float = 2e-3
    decay: float = 0.02
    warmup: int = 60
    average: float = 0.995
    every: int = 200
    threads: int = 2
    weights: Mapping[str, float] | None = None


@dataclass
class State:
    """What training carries from step to step."""

    model: MultiTaskModel
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0


@dataclass(frozen=True, slots=True)
class Feed:
    """Where batches come from: what there is to draw, what makes a batch of draws, and the tasks that learn from it."""

    tasks: Mapping[str, Task]
    composer: Composer
    shelf: Shelf


def train(
    model: MultiTaskModel, feed: Feed, *, plan: Plan, folder: Path, say: Say, evaluate: Evaluate | None = None
) -> MultiTaskModel:
    """Train ``model``; returns the averaged model in evaluation mode. A checkpoint in ``folder`` is resumed.

    Every ``plan.every`` steps a checkpoint is written and ``evaluate`` (of the averaged model) is said.
    """
    torch.set_num_threads(plan.threads)
    keep_memory()
    state = begin(model, plan)
    resume(state, folder / CHECKPOINT, say)
    started, first = time.monotonic(), state.step
    values: dict[str, float] = {}
    for batch in batches(feed, plan, state.step):
        found = stepping.backward(stepping.losses(model, batch, feed.tasks), plan.weights or {})
        rate = stepping.learning_rate(state.step, steps=plan.steps, top=plan.rate, warmup=plan.warmup)
        stepping.apply(model, state.optimiser, rate)
        stepping.follow(state.average, model, step=state.step, decay=plan.average)
        state.step += 1
        values = {name: 0.97 * values.get(name, value) + 0.03 * value for name, value in found.items()}
        if state.step % 20 == 0:
            pace = (time.monotonic() - started) / (state.step - first)
            say(
                f"step {state.step}/{plan.steps} {pace:.2f} s/step "
                + " ".join(f"{n} {v:.3f}" for n, v in values.items())
            )
        if state.step % plan.every == 0 or state.step == plan.steps:
            write(state, folder / CHECKPOINT)
            if evaluate:
                say(f"step {state.step}: {evaluate(averaged(state))}")
    return averaged(state)


def batches(feed: Feed, plan: Plan, first: int) -> Iterator[Batch]:
    """The batches of steps ``first`` to ``plan.steps``; the next one is made on another thread meanwhile."""

    def make(step: int) -> Batch:
        generator = Generator().manual_seed(plan.seed * 1_000_003 + step)
        return feed.composer.batch(draw(plan.seed, step, feed.shelf, plan.mix), generator)

    with ThreadPoolExecutor(1, "batches", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = pool.submit(make, first)
        for step in range(first, plan.steps):
            batch = ahead.result()
            if step + 1 < plan.steps:
                ahead = pool.submit(make, step + 1)
            yield batch


def begin(model: MultiTaskModel, plan: Plan) -> State:
    """A fresh state; the model is put into training mode and channels_last."""
    model.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=plan.decay)
    return State(model, optimiser, {key: value.detach().clone() for key, value in model.state_dict().items()})


def averaged(state: State) -> MultiTaskModel:
    """A copy of the model with the averaged weights, in evaluation mode."""
    model = copy.deepcopy(state.model)
    model.load_state_dict(state.average)
    return model.eval()


def write(state: State, path: Path) -> None:
    """The whole state as one safetensors file."""
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in state.average.items()}
    for index, slots in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in slots.items()}
    save_tensors(path, tensors, {"step": str(state.step)})


def resume(state: State, path: Path, say: Say) -> None:
    """Continue from ``path`` when it is there. ModelError if it belongs to another model."""
    if not path.is_file():
        return
    tensors, facts = load_tensors(path)
    try:
        state.model.load_state_dict(_under(tensors, "model."))
        state.average = _under(tensors, "average.")
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _under(tensors, "optimiser.").items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        state.optimiser.load_state_dict({**state.optimiser.state_dict(), "state": slots})
        state.step = int(facts["step"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ModelError(
            f"{path} belongs to another training; remove it to begin anew: {str(error).splitlines()[0]}"
        ) from error
    say(f"resumed at step {state.step}")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
