"""The `multisegment` task: independent masks, whole again whatever the cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_mmm.model.card import TaskCard
from wsi_mmm.outputs.merge import merge_regions
from wsi_mmm.tasks import View, make_task
from wsi_mmm.types import Objects

CARD = TaskCard(
    name="layers", kind="multisegment", head="map", outputs=3,
    classes=("a", "b", "c"), colors=((0, 0, 0), (0, 200, 0), (200, 0, 0)),
)  # fmt: skip
TASK = make_task(CARD)


def canonical(objects: Objects) -> list[tuple[bytes, ...]]:
    """Everything that is said of the regions, in their order."""
    out = []
    for i in range(len(objects)):
        rings = range(objects.object_offsets[i], objects.object_offsets[i + 1])
        shape = [objects.coords[objects.ring_offsets[r] : objects.ring_offsets[r + 1]].tobytes() for r in rings]
        out.append((objects.anchor[i].tobytes(), bytes([objects.class_index[i]]), *shape))
    return out


@given(st.integers(0, 2**32), st.lists(st.integers(1, 29), max_size=2), st.lists(st.integers(1, 29), max_size=2))
@settings(max_examples=25)
def test_merged_regions_do_not_know_the_cores(seed: int, rows: list[int], columns: list[int]) -> None:
    """Masks that lie on each other, cut anywhere and dissolved, are those of the whole plane, in the same order."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 127, 128, 255], np.uint8), (3, 15, 15))
    maps = np.repeat(np.repeat(coarse, 2, 1), 2, 2)
    if seed % 3 == 0:
        maps[1] = maps[0]  # regions of two classes that are the same: equal anchors
    cuts = [[0, *sorted({2 * i for i in some}), 60] for some in (rows, columns)]
    cores = [(a, c, b, d) for a, b in pairwise(cuts[0]) for c, d in pairwise(cuts[1])]
    whole = merge_regions([TASK.interpret(maps, View(0, 0, (0, 0, 60, 60), 1.0, 1.0, 59, 60))])
    parts = merge_regions([TASK.interpret(maps, View(0, 0, core, 1.0, 1.0, 59, 60)) for core in cores])
    assert canonical(parts) == canonical(whole)
    for k in range(3):
        drawn = (maps[k] >= 128).repeat(2, 0).repeat(2, 1)[:60, :59].sum()
        assert _area(whole, k) == drawn


def _area(objects: Objects, index: int) -> float:
    total = 0.0
    for i in np.flatnonzero(objects.class_index == index):
        for r in range(objects.object_offsets[i], objects.object_offsets[i + 1]):
            ring = objects.coords[objects.ring_offsets[r] : objects.ring_offsets[r + 1]]
            following = np.roll(ring, -1, axis=0)
            total += 0.5 * float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum())
    return total


def test_masks_lie_on_each_other() -> None:
    """A px of two classes is drawn twice; one of none is not."""
    maps = np.zeros((3, 8, 8), np.uint8)
    maps[0, 2:6, 2:6], maps[2, 2:6, 2:6] = 255, 200
    found = TASK.interpret(maps, View(0, 0, (0, 0, 16, 16), 0.5, 0.5, 16, 16))
    assert found.class_index.tolist() == [0, 2]
    assert found.anchor.tolist() == [[4, 4], [4, 4]]
    assert TASK.info.dissolves


def test_unknown_px_count_neither_for_nor_against() -> None:
    """Loss and figures see only what is known; a class that is nowhere known takes no part; no truth costs nothing."""
    import torch

    truth = np.full((3, 8, 8), -1, np.int8)
    truth[0, :4], truth[1] = 1, 0
    target = TASK.target(truth)
    assert target.shape == (3, 4, 4) and target.dtype == torch.int8
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    assert TASK.loss(logits, target[None]).item() == pytest.approx(1.0, abs=1e-6)
    sure = torch.tensor([9.0, -9.0, 9.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert float(TASK.loss(sure, target[None])) < 1e-3
    maps = TASK.quantise(sure)[0].numpy()
    assert TASK.metrics([(truth, maps)]) == {"mean_iou": 1.0, "mean_dice": 1.0}
    loss = TASK.loss(logits, torch.full((1, 3, 4, 4), -1, dtype=torch.int8))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not bool(logits.grad.any())


def test_half_of_a_mask_found_is_an_iou_of_one_half() -> None:
    """Figures are averages over the classes that occur."""
    truth = np.zeros((3, 8, 8), np.int8)
    truth[0] = 1
    maps = np.zeros((3, 4, 4), np.uint8)
    maps[0, :2] = 255
    assert TASK.metrics([(truth, maps)]) == pytest.approx({"mean_iou": 0.5, "mean_dice": 2 / 3})


def test_weights_make_a_mask_count_more() -> None:
    """weight:<class> raises what px of that mask cost, not those beside it."""
    import torch

    heavy = make_task(CARD.model_copy(update={"params": {"weight:a": 9}}))
    truth = np.zeros((3, 8, 8), np.int8)
    truth[0, :2] = 1
    logits = torch.full((1, 3, 4, 4), -2.0)
    target = TASK.target(truth)[None]
    assert float(heavy.loss(logits, target)) > 1.5 * float(TASK.loss(logits, target))
    assert float(heavy.loss(logits * 0, target)) == pytest.approx(1.0, abs=1e-6)
