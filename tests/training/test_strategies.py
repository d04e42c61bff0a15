"""Step rules: the accumulated gradient is the joint one, memory stays flat, papers' formulas hold, NaN never steps."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.training import BAGS, KINDS, batch, tiny
from wsi_mmm.errors import ConfigError, NotFinite
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import TASK_KINDS, Task
from wsi_mmm.training.forward import TrainingContext
from wsi_mmm.training.loader import TrainBatch
from wsi_mmm.training.strategies import (
    STRATEGIES,
    Balance,
    GradNorm,
    StrategyInputs,
    StrategyPlan,
    Uncertainty,
    last_shared,
    make_strategy,
    project,
)

EVERY = sorted([*TASK_KINDS, *BAGS])
PAIRS = [  # the fast suite has each kind twice, the slow one every pair
    pytest.param(pair, marks=() if pair[1] in (EVERY[(EVERY.index(pair[0]) + 1) % len(EVERY)],) else pytest.mark.slow)
    for pair in itertools.combinations_with_replacement(EVERY, 2)
]


def gradients(model: MultiTaskModel) -> dict[str, Tensor]:
    """Of the parameters that have one; they are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def run(
    model: MultiTaskModel, tasks: Mapping[str, Task], batches: Sequence[TrainBatch], name: str, **options: object
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one step by a fresh rule; running statistics are put back."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = make_strategy(StrategyPlan(name), list(tasks))(
        StrategyInputs(TrainingContext(model, tasks), tuple(batches), **options)
    )  # type: ignore[arg-type]
    model.load_state_dict(before)
    return losses, gradients(model)


def step_of(pair: Sequence[str], tasks: Mapping[str, Task], names: tuple[str, str] = ("t0", "t1")) -> list[TrainBatch]:
    """A batch for each task, and one for both where one picture can serve both: else another one for the first."""
    first, second = zip(names, pair, strict=True)
    both = dict((first, second)) if (pair[0] in BAGS) == (pair[1] in BAGS) else dict((first,))
    wanted = [dict((first,)), dict((second,)), both]
    return [batch(tasks, kinds, seed=i, items=2) for i, kinds in enumerate(wanted)]


def test_every_registered_kind_can_be_tested() -> None:
    """The helpers know a card and a truth of each kind in the registry."""
    assert set(TASK_KINDS) <= set(KINDS)


@pytest.fixture(scope="module")
def twice() -> tuple[MultiTaskModel, dict[str, Task]]:
    """A float64 model with two tasks of every kind: "t0" to the number of kinds, then again."""
    model, tasks = tiny(EVERY * 2)
    return model.double(), tasks


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(pair))
def test_task_by_task_gives_the_gradient_of_the_joint_loss(
    pair: tuple[str, str], twice: tuple[MultiTaskModel, dict[str, Task]]
) -> None:
    """Accumulated gradients are those of one graph of all batches and tasks, to 1e-6 in float64, for any two kinds."""
    model, tasks = twice
    names = (f"t{EVERY.index(pair[0])}", f"t{EVERY.index(pair[1]) + len(EVERY)}")
    batches = step_of(pair, tasks, names)
    losses, joint = run(model, tasks, batches, "joint", weights={names[1]: 0.3})
    again, found = run(model, tasks, batches, "accumulate", weights={names[1]: 0.3})
    assert losses == pytest.approx(again, abs=1e-12) and set(losses) == set(names)
    assert found.keys() == joint.keys()
    assert any(float(g.abs().max()) > 1e-4 for g in joint.values())
    assert max(float((found[k] - joint[k]).abs().max()) for k in joint) < 1e-6


def test_the_joint_loss_is_the_mean_over_micro_batches_per_task() -> None:
    """Doing every micro-batch twice changes neither losses nor gradients."""
    model, tasks = tiny(["classify", "segment"])
    batches = step_of(["classify", "segment"], tasks)
    losses, once = run(model.double(), tasks, batches, "accumulate")
    again, twice = run(model, tasks, batches * 2, "accumulate")
    assert losses == pytest.approx(again, abs=1e-12)
    assert max(float((once[k] - twice[k]).abs().max()) for k in once) < 1e-12


def test_a_batch_for_several_tasks_passes_the_encoder_once() -> None:
    """Whatever the rule, the encoder runs once per batch."""
    model, tasks = tiny(["classify", "segment", "instances"])
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    one = batch(tasks, {"t0": "classify", "t1": "segment", "t2": "instances"}, seed=1)
    for name in STRATEGIES:
        run(model, tasks, [one], name)
    assert len(calls) == len(STRATEGIES)


def test_heads_that_no_batch_serves_have_no_gradient() -> None:
    """grad stays None, so that no optimiser moves them; a batch whose items all failed serves nobody."""
    model, tasks = tiny(["classify", "segment"])
    empty = TrainBatch("feed", (), failed=("a: broken",))
    for name in STRATEGIES:
        losses, found = run(model, tasks, [batch(tasks, {"t1": "segment"}, seed=1), empty], name)
        assert set(losses) == {"t1"}
        assert not any(key.startswith("heads.t0") for key in found)
        assert any(key.startswith("heads.t1") for key in found)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_in_which_nothing_was_read_leaves_nothing(name: str) -> None:
    """No losses, no gradients."""
    model, tasks = tiny(["classify", "segment"])
    assert run(model, tasks, [TrainBatch("feed", (), failed=("a: broken",))], name) == ({}, {})


@pytest.mark.parametrize("name", STRATEGIES)
def test_nan_is_named(name: str) -> None:
    """NotFinite says the task, the items and the step."""
    model, tasks = tiny(["regress", "segment"])
    bad = batch(tasks, {"t0": "regress"}, seed=1)
    bad = replace(bad, targets={"t0": torch.full_like(bad.targets["t0"], torch.inf)})
    with pytest.raises(NotFinite, match=r"step 7: the loss of task 't0' is (nan|inf) on 'feed/1/0', 'feed/1/1'"):
        run(model, tasks, [batch(tasks, {"t1": "segment"}, seed=2), bad], name, step=7)


def test_dropout_belongs_to_the_batch() -> None:
    """A batch's gradient does not depend on what was drawn before it."""
    model, tasks = tiny(["classify"])
    one = batch(tasks, {"t0": "classify"}, seed=1)
    _, first = run(model, tasks, [one], "accumulate")
    torch.rand(17)
    _, second = run(model, tasks, [one], "accumulate")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_an_unknown_rule_is_refused() -> None:
    """ConfigError lists the known ones."""
    with pytest.raises(ConfigError, match=r"'magic'.*accumulate.*pcgrad"):
        make_strategy(StrategyPlan("magic"), ["a"])


# ---------------------------------------------------------------- PCGrad
def test_conflicting_gradients_are_projected() -> None:
    """Two vectors at an obtuse angle: each loses what points against the other (worked by hand)."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    # a - (a.b / b.b) b = (1, 0) + 0.5 (-1, 1) = (0.5, 0.5); b - (b.a / a.a) a = (-1, 1) + (1, 0) = (0, 1)
    assert torch.allclose(project([a, b], 0), torch.tensor([0.5, 1.5]))


def test_gradients_that_agree_are_added() -> None:
    """Without conflict the sum is the plain one; one gradient passes as it is."""
    a, b = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    assert torch.equal(project([a, b], 0), a + b)
    assert torch.equal(project([a], 3), a)


def test_pcgrad_projects_the_shared_part_only() -> None:
    """Shared gradients are the projected ones of each task alone; heads have the joint gradient."""
    pair = ["classify", "segment"]
    model, tasks = tiny(pair)
    batches = [batch(tasks, {"t0": "classify"}, seed=1), batch(tasks, {"t1": "segment"}, seed=2)]
    model.double()
    alone = [run(model, tasks, [one], "joint")[1] for one in batches]
    trunk = [n for n, _ in model.named_parameters() if not n.startswith("heads.")]
    flats = [torch.cat([g.get(n, torch.zeros_like(model.get_parameter(n))).reshape(-1) for n in trunk]) for g in alone]
    _, found = run(model, tasks, batches, "pcgrad", step=5)
    wanted = project(flats, 5)
    seen = torch.cat([found.get(n, torch.zeros_like(model.get_parameter(n))).reshape(-1) for n in trunk])
    assert float((wanted - seen).abs().max()) < 1e-10
    _, joint = run(model, tasks, batches, "joint")
    assert all(float((found[n] - joint[n]).abs().max()) < 1e-12 for n in joint if n.startswith("heads."))


# ---------------------------------------------------------------- GradNorm
def test_gradnorm_moves_weights_as_the_paper_says() -> None:
    """One update equals gradient descent on sum |G - mean(G) r^alpha| by autograd, weights keeping their sum."""
    pair = ["classify", "segment"]
    model, tasks = tiny(pair)
    batches = [batch(tasks, {"t0": "classify"}, seed=1), batch(tasks, {"t1": "segment"}, seed=2)]
    model.double()
    rule = GradNorm(("t0", "t1"), 1.5, 0.1, Balance(2))
    rule.own.first.copy_(torch.tensor([2.0, 0.7]))
    losses, norms = {}, []
    for name, one in zip(tasks, batches, strict=True):
        values, grads = run(model, tasks, [one], "joint")
        losses |= values
        layer = {id(p) for p in last_shared(model)}
        own = [grads[n].reshape(-1) for n, p in model.named_parameters() if id(p) in layer]
        norms.append(torch.cat(own).norm())
        assert name in values
    rule(StrategyInputs(TrainingContext(model, tasks), tuple(batches)))
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    g = weight * torch.stack(norms)
    pace = torch.tensor([losses["t0"] / 2.0, losses["t1"] / 0.7], dtype=torch.float64)
    target = (g.mean() * (pace / pace.mean()) ** 1.5).detach()
    (slope,) = torch.autograd.grad((g - target).abs().sum(), weight)
    wanted = (weight - 0.1 * slope).detach()
    assert torch.allclose(rule.own.weight, wanted * 2.0 / wanted.sum(), atol=1e-9)
    assert not torch.allclose(rule.own.weight, torch.ones(2, dtype=torch.float64))


def test_gradnorm_remembers_first_losses_and_leaves_absent_tasks() -> None:
    """First losses are those of the first step of each task; a task of one step alone keeps its weight."""
    model, tasks = tiny(["classify", "segment"])
    rule = GradNorm(("t0", "t1"), 1.5, 0.1, Balance(2))
    losses = rule(StrategyInputs(TrainingContext(model, tasks), (batch(tasks, {"t0": "classify"}, seed=1),)))
    assert rule.own.first[0] == losses["t0"] and bool(rule.own.first[1].isnan())
    assert rule.own.weight.tolist() == [1.0, 1.0]


def test_gradnorm_needs_an_encoder_that_learns() -> None:
    """A frozen encoder has nothing to balance at."""
    model, tasks = tiny(["classify", "segment"])
    model.encoder.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        run(model, tasks, [batch(tasks, {"t0": "classify"}, seed=1)], "gradnorm")


# ---------------------------------------------------------------- uncertainty
def test_uncertainty_has_the_gradient_of_its_formula() -> None:
    """Gradients of weights and of s are those of sum exp(-s) L + s by autograd."""
    model, tasks = tiny(["classify", "segment"])
    batches = [batch(tasks, {"t0": "classify"}, seed=1), batch(tasks, {"t1": "segment"}, seed=2)]
    model.double()
    rule = make_strategy(StrategyPlan("uncertainty"), list(tasks))
    assert isinstance(rule, Uncertainty)
    with torch.no_grad():
        rule.own.s[0].fill_(0.4)
    losses = rule(StrategyInputs(TrainingContext(model, tasks), tuple(batches)))
    found = gradients(model)
    assert float(rule.own.s[0].grad) == pytest.approx(1 - math.exp(-0.4) * losses["t0"])
    assert float(rule.own.s[1].grad) == pytest.approx(1 - losses["t1"])
    _, wanted = run(model, tasks, batches, "joint", weights={"t0": math.exp(-0.4)})
    assert max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < 1e-7  # s is float32


# ---------------------------------------------------------------- memory
def peak_of(tasks: int, together: bool) -> int:
    """Bytes at most that tensors kept for backward take in one step of ``tasks`` segment tasks: in one batch for all of
    them, or in a batch for each. Parameters are not counted."""
    model, made = tiny(["segment"] * tasks)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}
    live, top = 0, 0

    class Kept:
        """A tensor that backward will want; its size is taken off when it is let go."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal live, top
            self.tensor = tensor
            self.key = tensor.untyped_storage().data_ptr()
            if self.key in own:
                return
            if not held.get(self.key):
                live += tensor.untyped_storage().nbytes()
                top = max(top, live)
            held[self.key] = held.get(self.key, 0) + 1

        def __del__(self) -> None:
            nonlocal live
            if self.key in own:
                return
            held[self.key] -= 1
            if not held[self.key]:
                live -= self.tensor.untyped_storage().nbytes()

    names = list(made)
    groups = [names] if together else [[name] for name in names]
    batches = tuple(batch(made, dict.fromkeys(g, "segment"), seed=i) for i, g in enumerate(groups))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        make_strategy(StrategyPlan(), names)(StrategyInputs(TrainingContext(model, made), batches))
    return top


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "a batch each"])
def test_memory_does_not_grow_with_the_number_of_tasks(together: bool) -> None:
    """What is kept for backward at one time is the same for 1, 4 and 16 tasks."""
    found = [peak_of(n, together) for n in (1, 4, 16)]
    assert found[0] > 1 << 20
    assert max(found) <= 1.01 * found[0], found


PROCESS = """
import os, re, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers.training import batch, tiny
from wsi_mmm.training.forward import TrainingContext
from wsi_mmm.training.strategies import StrategyInputs, StrategyPlan, make_strategy


def peak():  # not getrusage's, which a process inherits from the one that began it
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])


def growth(count, name):
    model, tasks = tiny(["segment"] * count)
    one = batch(tasks, dict.fromkeys(tasks, "segment"), seed=0, items=48)
    work = StrategyInputs(TrainingContext(model, tasks), (one,))
    before = peak()
    make_strategy(StrategyPlan(name), list(tasks))(work)
    return peak() - before


for words in sys.argv[2:]:
    name, count = words.split("=")
    if child := os.fork():  # a process of its own, in which torch need not be imported again
        assert os.waitpid(child, 0)[1] == 0
        continue
    print(growth(int(count), name), flush=True)
    os._exit(0)
"""


def process_peaks(*steps: str) -> list[int]:
    """KB that each step, such as "joint=64" (tasks), adds to the peak of a process of its own."""
    tests = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tests), *steps], check=True, capture_output=True, text=True
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_the_process_does_not_grow_with_the_number_of_tasks() -> None:
    """Peak memory of a process: 16 tasks on one batch cost as much as 1, while the joint graph of 64 costs more."""
    one, four, many, joint = process_peaks("accumulate=1", "accumulate=4", "accumulate=16", "joint=64")
    assert one > 50_000 and max(four, many) < 1.1 * one, (one, four, many)
    assert joint > 1.3 * many
