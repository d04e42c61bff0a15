"""The pictures of a step as one micro-batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from helpers.annotation_targets import joint
from helpers.training import batch, tiny
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.training import job
from wsi_mmm.training.config import parse
from wsi_mmm.training.forward import TrainingContext
from wsi_mmm.training.loader import LoadPlan, batches, mixed, pictures, together
from wsi_mmm.training.strategies import StrategyInputs, StrategyPlan, make_strategy

KINDS = {"t0": "classify", "t1": "instances"}


def test_what_a_task_knows_it_learns_from_all_the_same() -> None:
    """With norms that keep their statistics, the loss of each task and the gradient of a step are those of the
    micro-batches by themselves; bags, and micro-batches of which nothing was read, stay as they are."""
    model, tasks = tiny(["classify", "instances", "bag-classify"])
    model = model.double().eval()
    apart = (
        batch(tasks, {"t0": "classify"}, seed=1, items=3, feed="a"),
        batch(tasks, {"t1": "instances"}, seed=2, items=2, feed="b"),
        batch(tasks, {"t2": "bag-classify"}, seed=3, feed="bags"),
        replace(batch(tasks, {"t0": "classify"}, seed=4, items=1, feed="lost"), keys=(), failed=("x: why",)),
    )
    found = together(apart, tasks)
    assert [len(one) for one in found] == [5, 3, 0] and found[0].feed == "a+b" and found[2].failed == ("x: why",)
    assert set(found[0].targets) == {"t0", "t1"} and found[0].keys == apart[0].keys + apart[1].keys
    results = []
    for some in (apart, found):
        model.zero_grad(set_to_none=True)
        losses = make_strategy(StrategyPlan(), tuple(tasks))(StrategyInputs(TrainingContext(model, tasks), some))
        results.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert results[0][0].keys() == results[1][0].keys() == {"t0", "t1", "t2"}
    for name, value in results[0][0].items():
        assert abs(value - results[1][0][name]) < 1e-9, name
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


def test_one_micro_batch_is_left_alone() -> None:
    """There is nothing to mix."""
    _, tasks = tiny(["classify"])
    one = (batch(tasks, {"t0": "classify"}, seed=1),)
    assert together(one, tasks)[0] is one[0]


def test_pictures_of_a_training_are_those_of_its_data_sets(tmp_path: Path) -> None:
    """The stream of a configuration with ``sampling.mixed``: the same crops, whatever the sizes of their pictures."""
    config = parse(joint(tmp_path))
    prepared = job.prepare(config)
    feeds = [one.feed for one in prepared.data]
    plan = LoadPlan(config.model.learnt_px, seed=1, threads=0)
    apart = next(batches(feeds, prepared.tasks, plan=plan, steps=range(3)))
    [whole] = next(mixed(batches(feeds, prepared.tasks, plan=plan, steps=range(3)), prepared.tasks))
    assert len(whole) == sum(map(len, apart)) == 8
    crops = torch.cat([pictures(one) for one in apart])
    assert torch.equal(pictures(whole), crops) and float(np.ptp(crops.numpy())) > 0.3


def test_a_mixed_training_of_small_crops(tmp_path: Path) -> None:
    """From the configuration to the model: crops smaller than the tiles of a run, and parts that paths name."""
    raw = joint(tmp_path, steps=2)
    words = {"p0": "train", "p1": "val", "p2": "train", "p3": "test"}
    for folder in ("patches/dark", "patches/pale", "discs/images", "discs/masks"):
        for path in sorted((tmp_path / folder).iterdir()):
            (tmp_path / folder / words[path.name[:2]]).mkdir(exist_ok=True)
            path.rename(tmp_path / folder / words[path.name[:2]] / path.name)
    raw |= {"sampling": {"mixed": True}, "model": {**raw["model"], "tile_size": 64, "crop": 32}}
    raw["data"] = [{**data, "part": "(train|val|test)/"} for data in raw["data"]]
    config = parse(raw)
    for one in job.prepare(config).data:
        keys = one.feed.source.index.keys
        for part in ("train", "val", "test"):
            assert {words[keys[n].rpartition("/")[2][:2]] for n in one.split.part(part)} == {part}
    done = job.train(config)
    assert done.step == 2 and set(done.test) == {"tissue", "disc"}
    assert load_model(done.model).card.tile_size == 64
