"""The `instances` task: any way of cutting the plane into cores gives the same objects, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_mmm.model.card import TaskCard
from wsi_mmm.outputs.polygons import concat
from wsi_mmm.tasks import View, instances, make_task, metrics
from wsi_mmm.tasks.instances import Instances
from wsi_mmm.types import I32, U8, Objects

CARD = TaskCard(name="nuclei", kind="instances", head="map", outputs=4, classes=("nucleus",), colors=((0, 160, 80),))
TASK = make_task(CARD)
assert isinstance(TASK, Instances)
SCALE = 1.9873


CLASSED = make_task(
    TaskCard(
        name="cells", kind="instances", head="map", outputs=7, classes=("a", "b", "c"), colors=((0, 0, 0),) * 3,
    )
)  # fmt: skip
assert isinstance(CLASSED, Instances)


def discs(rng: np.random.Generator, height: int, width: int, count: int) -> I32:
    """Label image of overlapping discs and ellipses."""
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int32)
    for i in range(1, count + 1):
        cy, cx, a, b = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 14), rng.uniform(3, 14)
        labels[((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 <= 1] = i
    return labels


def maps_of(labels: I32, rng: np.random.Generator, noise: float = 0.0) -> U8:
    """Perfect maps of a label image, with noise on every byte."""
    t = np.asarray(TASK.target(labels).numpy(), np.float64)
    offset = t[2:4] / 2 * instances.STEPS + instances.ZERO
    exact = np.concatenate([t[:2] * 255, offset])
    return np.clip(np.round(exact + noise * rng.standard_normal(exact.shape)), 0, 255).astype(np.uint8)


def wild(rng: np.random.Generator, height: int, width: int) -> U8:
    """Maps that no network would give: random bytes, smooth in places, with plateaus."""
    rough = rng.integers(0, 256, (7, height // 2, width // 2), np.uint8)
    if rng.random() < 0.5:
        rough[2:] = 128 + rng.integers(-6, 7, rough[2:].shape)
    if rng.random() < 0.5:
        rough[:2] = np.where(rough[:1] > rng.integers(0, 256), 255, 0)
    if rng.random() < 0.5:
        rough[2:4] = rng.choice([0, 64, 128, 192, 255], (2, 1, 1))
    return rough


def edges(draw_: st.DrawFn, size: int) -> list[int]:
    """Even cuts of [0, size)."""
    inner = draw_(st.lists(st.integers(1, max(1, size // 2 - 1)), max_size=4, unique=True))
    return [0, *sorted(2 * i for i in inner if 2 * i < size), size + size % 2]


def interpret(maps: U8, core: tuple[int, int, int, int], size: tuple[int, int], task: Instances = TASK) -> Objects:
    """Interpretation of one core from a window that has just the halo it asks for."""
    y0, x0 = (max(0, core[i] - task.halo) // 2 * 2 for i in (0, 1))
    y1, x1 = (min(-(-size[i] // 2) * 2, core[i + 2] + task.halo) for i in (0, 1))
    window = np.ascontiguousarray(maps[:, y0 // 2 : -(-y1 // 2), x0 // 2 : -(-x1 // 2)])
    return task.interpret(window, View(y0, x0, core, SCALE, SCALE, size[1], size[0]))


def canonical(objects: Objects) -> list[tuple[bytes, ...]]:
    """One entry per object, in the order of the anchors."""
    out = []
    for i in np.lexsort((objects.anchor[:, 1], objects.anchor[:, 0])):
        rings = range(objects.object_offsets[i], objects.object_offsets[i + 1])
        shape = [objects.coords[objects.ring_offsets[r] : objects.ring_offsets[r + 1]].tobytes() for r in rings]
        numbers = [objects.measurements[name][i].tobytes() for name in sorted(objects.measurements)]
        out.append((objects.anchor[i].tobytes(), objects.class_index[i].tobytes(), *numbers, *shape))
    return out


@st.composite
def scenes(draw: st.DrawFn) -> tuple[U8, tuple[int, int], list[int], list[int]]:
    """Maps of a plane, its size in target px, and cuts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width = draw(st.integers(20, 420)), draw(st.integers(20, 420))
    even = height + height % 2, width + width % 2
    kind = draw(st.sampled_from(["discs", "noisy", "wild"]))
    if kind == "wild":
        maps = wild(rng, *even)
    else:
        maps = maps_of(discs(rng, *even, height * width // 600 + 1), rng, 30.0 if kind == "noisy" else 0.0)
        maps = np.concatenate([maps, rng.integers(0, 256, (3, *maps.shape[1:]), np.uint8)])
    return maps, (height, width), edges(draw, height), edges(draw, width)


@given(scenes(), st.sampled_from([256, 4096]), st.sampled_from([1, 6]))
@settings(max_examples=80)
def test_any_partition_into_cores_gives_the_same_objects(
    scene: tuple[U8, tuple[int, int], list[int], list[int]], votes: int, hops: int
) -> None:
    """Objects found core by core, each with its halo only, are those of the whole plane to the last bit."""
    maps, size, rows, columns = scene
    task = replace(CLASSED, rules=instances.Rules(votes=votes, hops=hops, area=4))
    whole = interpret(maps, (0, 0, rows[-1], columns[-1]), size, task)
    cores = [(a, c, b, d) for a, b in pairwise(rows) for c, d in pairwise(columns)]
    parts = concat([interpret(maps, core, size, task) for core in cores])
    assert canonical(parts) == canonical(whole)


def test_objects_are_sorted_by_anchor_and_anchors_are_unique() -> None:
    """Within a core objects come in the order of their anchors, each owned once."""
    rng = np.random.default_rng(3)
    found = interpret(maps_of(discs(rng, 200, 200, 40), rng), (0, 0, 200, 200), (200, 200))
    keys = found.anchor[:, 0] * 1000 + found.anchor[:, 1]
    assert (np.diff(keys) > 0).all()


def test_perfect_maps_give_back_touching_discs() -> None:
    """From error-free maps nearly every disc, touching ones too, is found with IoU above one half."""
    rng = np.random.default_rng(1)
    truth = discs(rng, 400, 400, 60)
    found = TASK.labels(maps_of(truth, rng))
    large = np.bincount(truth.ravel())[truth] >= 60
    figures = metrics.match(np.where(large, truth, 0), found).quality()
    assert figures["recall"] > 0.9


def test_objects_stop_at_the_edge_of_the_slide() -> None:
    """Nothing is drawn beyond the slide's width and height, odd ones included."""
    rng = np.random.default_rng(5)
    maps = maps_of(discs(rng, 102, 102, 30), rng)
    found = TASK.interpret(maps, View(0, 0, (0, 0, 102, 102), 1.0, 1.0, 97, 101))
    assert len(found) > 5
    assert found.coords[:, 0].max() <= 97
    assert found.coords[:, 1].max() <= 101


def test_empty_maps_give_no_objects() -> None:
    """Blank glass is a valid, empty answer."""
    found = TASK.interpret(np.zeros((4, 64, 64), np.uint8), View(0, 0, (0, 0, 128, 128), 1.0, 1.0, 128, 128))
    assert len(found) == 0
    assert found.measurements["probability"].shape == (0,)


def test_a_window_off_the_map_grid_is_refused() -> None:
    """An odd origin is a mistake of the caller and says so."""
    with pytest.raises(ValueError, match="grid of 2"):
        TASK.interpret(np.zeros((4, 8, 8), np.uint8), View(1, 0, (0, 0, 8, 8), 1.0, 1.0, 16, 16))


def test_unknown_labels_are_left_out_of_the_loss() -> None:
    """A picture without truth adds nothing; with truth, perfect logits beat random ones."""
    import torch

    truth = discs(np.random.default_rng(0), 64, 64, 6)
    target = torch.stack([TASK.target(truth), TASK.target(np.full((64, 64), -1))])
    logits = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    perfect = torch.stack(
        [target[0, 0] * 12 - 6, torch.logit(target[0, 1].clamp(1e-3, 0.999)), target[0, 2] / 4, target[0, 3] / 4]
    )
    good = TASK.loss(torch.stack([perfect, logits[1]]), target)
    bad = TASK.loss(logits, target)
    assert float(good) < 0.2 * float(bad)
    assert 0.3 < float(bad) < 3.0
    assert float(TASK.loss(logits[1:], target[1:])) == 0.0


def test_quantise_rounds_probabilities_and_offsets() -> None:
    """Logit 0 is 128 of 255; an offset of one map px is `STEPS` above 128; what does not fit is cut."""
    import torch

    logits = torch.tensor([0.0, 100.0, 0.5, -100.0]).view(1, 4, 1, 1)
    assert TASK.quantise(logits).flatten().tolist() == [128, 255, 128 + instances.STEPS, 0]


def test_partly_unknown_pictures_teach_what_is_known() -> None:
    """Logits in unknown px, and in objects that touch them, change no loss; elsewhere the target is that of the whole
    picture, and so is what perfect maps score."""
    import torch

    truth = np.zeros((128, 128), np.int32)
    y, x = np.mgrid[:128, :128]
    for i, (cy, cx) in enumerate([(20, 20), (20, 62), (90, 40), (100, 100)], 1):
        truth[(y - cy) ** 2 + (x - cx) ** 2 <= 81] = i
    part = truth.copy()
    part[:40, 64:] = -1  # cuts the second disc
    target, whole = TASK.target(part), TASK.target(truth)
    unknown = torch.isnan(target[0])
    assert bool(unknown[:20, 32:].all())
    assert bool(unknown[10, 30]) and not bool(unknown[10, 10])
    assert torch.equal(target[:, ~unknown], whole[:, ~unknown])
    assert not bool(target[4][unknown].any())
    logits = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    other = torch.where(unknown, logits + 3.0, logits)
    assert float(TASK.loss(logits, target[None])) == float(TASK.loss(other, target[None]))
    figures = TASK.metrics([(part, maps_of(truth, np.random.default_rng(0)))])
    assert figures["precision"] == figures["recall"] == 1.0


def test_aggregated_jaccard_counts_what_was_missed() -> None:
    """Nothing found is 0, not perfect; a missed object adds its own area only; a false one its own."""
    truth = np.zeros((8, 8), np.int32)
    truth[:2, :2], truth[4:, 4:] = 1, 2
    assert metrics.match(truth, np.zeros_like(truth)).quality()["aji"] == 0.0
    assert metrics.match(np.zeros_like(truth), truth).quality()["aji"] == 0.0
    assert metrics.match(truth, np.where(truth == 1, 5, 0)).quality()["aji"] == 4 / (4 + 16)
    stray = np.where(truth == 1, 5, 0)
    stray[0, 4:] = 6
    assert metrics.match(truth, stray).quality()["aji"] == 4 / (4 + 16 + 4)
    assert metrics.match(truth, truth).quality()["aji"] == 1.0


def classed_picture() -> tuple[I32, I32]:
    """Nine discs of 9 px in rows of one class each, and the class of each px."""
    labels = np.zeros((128, 128), np.int32)
    y, x = np.mgrid[:128, :128]
    for number in range(9):
        labels[(y - 22 - 40 * (number // 3)) ** 2 + (x - 22 - 40 * (number % 3)) ** 2 <= 81] = number + 1
    return labels, np.where(labels > 0, (labels - 1) // 3, -1).astype(np.int32)


def test_objects_are_of_the_class_that_is_likeliest_over_their_pixels() -> None:
    """A stray px changes nothing; the probability is the mean of the class's bytes over the object's px."""
    labels, classes = classed_picture()
    chance = np.full((3, 64, 64), 40, np.uint8)
    for kind in range(3):
        chance[kind][classes[1::2, 1::2] == kind] = 175
    chance[:, 11, 11] = (0, 0, 255)  # the middle of the first object
    maps = np.concatenate([maps_of(labels, np.random.default_rng(0)), chance])
    found = interpret(maps, (0, 0, 128, 128), (128, 128), CLASSED)
    rows = (found.anchor[:, 0] - 22 + 20) // 40
    assert len(found) == 9 and (found.class_index == rows).all()
    drawn = CLASSED.labels(maps)
    fine = np.repeat(np.repeat(chance, 2, axis=1), 2, axis=2)
    for place, (y, x) in enumerate(found.anchor.tolist()):
        mean = fine[found.class_index[place]][drawn == drawn[y, x]].mean() / 255
        assert found.measurements["class_probability"][place] == pytest.approx(mean, abs=1e-12)
    assert CLASSED.metrics([(np.stack([labels, classes]), maps)])["class_f1"] == 1.0


def test_objects_that_nothing_is_sure_of_are_other() -> None:
    """Below `sure` an object is of the class `other`, with the probability of the class that it would have been."""
    labels, _ = classed_picture()
    chance = np.stack([np.full((64, 64), byte, np.uint8) for byte in (120, 90, 45)])
    maps = np.concatenate([maps_of(labels, np.random.default_rng(0)), chance])
    plain = interpret(maps, (0, 0, 128, 128), (128, 128), CLASSED)
    unsure = interpret(maps, (0, 0, 128, 128), (128, 128), replace(CLASSED, other=2, sure=0.5))
    assert (plain.class_index == 0).all() and (unsure.class_index == 2).all()
    assert unsure.measurements["class_probability"] == pytest.approx(120 / 255)


def test_outlines_and_classes_are_learnt_from_different_pictures() -> None:
    """Where no class is known only shapes have gradients, and where no outline is known only classes."""
    import torch

    labels, classes = classed_picture()
    outlined = CLASSED.target(np.stack([labels, np.full_like(labels, -1)]))
    pointed = CLASSED.target(np.stack([np.full_like(labels, -1), classes]))
    assert torch.equal(CLASSED.target(labels), outlined)
    for target, taught in ((outlined, slice(0, 4)), (pointed, slice(4, 7))):
        logits = torch.randn(1, 7, 64, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        CLASSED.loss(logits, target[None]).backward()
        assert logits.grad is not None
        some = logits.grad.abs().sum((0, 2, 3)) > 0
        assert some[taught].all() and int(some.sum()) == len(range(*taught.indices(7)))
    same = TASK.loss(torch.zeros(1, 4, 64, 64), TASK.target(labels)[None])
    assert float(CLASSED.loss(torch.zeros(1, 7, 64, 64), outlined[None])) == pytest.approx(float(same))
