"""The optimiser's side: schedules, who learns how fast, the scale of float16, averages, clipping."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from helpers.training import batch, tiny
from wsi_mmm.errors import ConfigError, NotFinite
from wsi_mmm.model.layers import depth_of, layers
from wsi_mmm.training import optim
from wsi_mmm.training.forward import TrainingContext
from wsi_mmm.training.optim import Optimiser, OptimPlan, Scale, factor
from wsi_mmm.training.ranks import owners
from wsi_mmm.training.strategies import Accumulate, StrategyInputs

NOTHING = nn.Module()


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("poly", 0.5**0.9)]
)
def test_schedules_have_their_closed_form(schedule: str, middle: float) -> None:
    """After 10 steps of warm-up: 1, then the middle at half of the rest, then 0 (constant: 1) and no further."""
    plan = OptimPlan(schedule=schedule, warmup=10)  # type: ignore[arg-type]
    end = 1.0 if schedule == "constant" else 0.0
    found = [factor(plan, step, 110) for step in (0, 4, 9, 10, 60, 110, 200)]
    assert found == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1.0, middle, end, end])


def test_schedules_end_at_the_floor_and_never_rise() -> None:
    """Every schedule falls from 1 to its floor, one value per step, whatever came before."""
    for schedule in ("linear", "cosine", "poly"):
        plan = OptimPlan(schedule=schedule, floor=0.1, power=2.0)
        found = [factor(plan, step, 50) for step in range(51)]
        assert found[0] == 1.0 and found[-1] == pytest.approx(0.1)
        assert all(a > b for a, b in itertools.pairwise(found))


def test_rates_fall_with_depth_and_norms_do_not_decay() -> None:
    """Heads have the whole rate, each layer below a fixed share of the one above; vectors have no weight decay."""
    model, _ = tiny(["classify", "segment"])
    plan = OptimPlan(layer_decay=0.5, decay=0.1)
    found = {x.name: x for x in optim.learners(model, NOTHING, plan)}
    top = depth_of(model) - 1
    for layer in layers(model):
        assert found[layer.name].factor == 0.5 ** (top - layer.depth)
        assert found[layer.name].decay == (0.1 if layer.parameter.ndim > 1 else 0.0)
    assert {x.factor for x in found.values() if x.name.startswith("heads.")} == {1.0}
    assert min(x.factor for x in found.values()) == 0.5**top


def test_frozen_depths_neither_move_nor_count() -> None:
    """Their weights and statistics stay to the bit while the others move; their modules are in evaluation mode."""
    model, tasks = tiny(["classify", "segment"])
    plan = OptimPlan(frozen=3, rate=0.1)
    optim.begin(model, plan)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = Optimiser(optim.learners(model, NOTHING, plan), plan)
    Accumulate()(
        StrategyInputs(TrainingContext(model, tasks), (batch(tasks, {"t0": "classify", "t1": "segment"}, seed=1),))
    )
    optim.ready(optimiser.learning, plan, Scale())
    optimiser.step(1.0)
    after = model.state_dict()
    still = {x.name for x in layers(model) if x.depth < 3}
    assert all(torch.equal(before[n], after[n]) for n in still)
    assert torch.equal(before["encoder.backbone.bn1.running_mean"], after["encoder.backbone.bn1.running_mean"])
    assert not model.encoder.get_submodule("backbone.layer1").training and model.heads.training
    assert not torch.equal(before["heads.t0.out.weight"], after["heads.t0.out.weight"])


def test_a_model_without_anything_to_learn_is_refused() -> None:
    """Freezing the heads, too, is an error that names the number of depths."""
    model, _ = tiny(["classify"])
    with pytest.raises(ConfigError, match=f"the model has {depth_of(model)} depths"):
        optim.begin(model, OptimPlan(frozen=99))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_optimiser_is_torchs(kind: str) -> None:
    """Three steps give the bits of torch's own optimiser with the same groups and rates."""
    torch.manual_seed(0)
    mine, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(mine.state_dict())
    plan = OptimPlan(kind=kind, rate=0.1, decay=0.05)  # type: ignore[arg-type]
    learning = [
        optim.Learner("weight", mine.weight, 1.0, 0.05),
        optim.Learner("bias", mine.bias, 0.5, 0.0),
    ]
    groups = [{"params": [theirs.weight], "weight_decay": 0.05}, {"params": [theirs.bias], "weight_decay": 0.0}]
    torchs: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=0.1) if kind == "adamw" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    )
    optimiser = Optimiser(learning, plan)
    for step in range(3):
        x = torch.randn(5, 4)
        for group, share in zip(torchs.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = 0.1 * (1.0 - 0.2 * step) * share
        mine(x).square().sum().backward()
        theirs.zero_grad()
        theirs(x).square().sum().backward()
        optimiser.step(1.0 - 0.2 * step)
        torchs.step()
        assert torch.equal(mine.weight, theirs.weight) and torch.equal(mine.bias, theirs.bias)
        assert mine.weight.grad is None


def test_the_scale_follows_torchs_rule() -> None:
    """Over a row of overflows and good steps the scale is that of torch's GradScaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    sgd, mine = torch.optim.SGD([weight], lr=0.0), Scale(1024.0, 0, 3)
    for bad in [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1]:
        scaler.scale(weight.sum() * (math.inf if bad else 1.0)).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        mine = mine.after(overflow=bool(bad))
        assert mine.value == scaler.get_scale()


def test_the_scale_is_undone_before_clipping() -> None:
    """Scaled gradients end as the unscaled ones, clipped to the norm; an overflow is None, once there is a scale."""
    weight = nn.Parameter(torch.zeros(2))
    learning = [optim.Learner("w", weight, 1.0, 0.0)]
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    assert optim.ready(learning, OptimPlan(clip=1.0), Scale(1024.0, 0, 10)) == pytest.approx(5.0)
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8]), atol=1e-5)
    weight.grad = torch.tensor([math.inf, 1.0])
    assert optim.ready(learning, OptimPlan(), Scale(1024.0, 0, 10)) is None
    with pytest.raises(NotFinite, match="'w'"):
        optim.ready(learning, OptimPlan(), Scale())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_nearly_the_same_gradient(precision: optim.Precision) -> None:
    """With autocast (and the scale) the gradient points where the full one does."""
    model, tasks = tiny(["classify", "segment", "instances"])
    one = batch(tasks, {"t0": "classify", "t1": "segment", "t2": "instances"}, seed=1)
    found = []
    for p in ("full", precision):
        scale = Scale(256.0, 0, 10) if p == "fp16" else Scale()
        context = TrainingContext(model, tasks, precision=optim.autocast_type(p))  # type: ignore[arg-type]
        Accumulate()(StrategyInputs(context, (one,), scale=scale.value))
        optim.ready(optim.learners(model, NOTHING, OptimPlan()), OptimPlan(clip=0.0), scale)
        found.append(torch.cat([q.grad.reshape(-1) for q in model.parameters() if q.grad is not None]))
        model.zero_grad(set_to_none=True)
    assert float(torch.nn.functional.cosine_similarity(found[0], found[1], dim=0)) > 0.99
    assert 0.95 < float(found[1].norm() / found[0].norm()) < 1.05


def test_the_average_follows_and_can_be_lent() -> None:
    """The share of the past grows to its limit; inside `swapped` the model has the average, outside its own weights."""
    model = nn.Linear(1, 1)
    average = optim.first_average(model)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average["weight"].fill_(0.0)
    optim.follow(average, model, step=0, decay=0.9)
    assert float(average["weight"]) == pytest.approx(1 - 1 / 10)
    average["weight"].fill_(0.0)
    optim.follow(average, model, step=10**6, decay=0.9)
    assert float(average["weight"]) == pytest.approx(0.1)
    with optim.swapped(model, average):
        assert model.weight.item() == pytest.approx(0.1) and not model.training
    assert model.weight.item() == 1.0 and model.training


def test_shards_are_even() -> None:
    """Owners share the parameters out so that no rank holds more than the others by more than one of them."""
    sizes = [900, 10, 20, 500, 400, 30, 0, 5]
    found = owners(sizes, 2)
    load = [sum(s for s, o in zip(sizes, found, strict=True) if o == r) for r in range(2)]
    assert abs(load[0] - load[1]) <= 10
    assert owners(sizes, 1) == [0] * 8
