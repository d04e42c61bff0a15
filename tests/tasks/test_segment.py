"""The `segment` task: classes per pixel, as regions cut at the core's rim."""

from __future__ import annotations

import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_mmm.model.card import TaskCard
from wsi_mmm.outputs.polygons import concat
from wsi_mmm.tasks import View, make_task
from wsi_mmm.types import Objects

CARD = TaskCard(
    name="tissue", kind="segment", head="map", outputs=3,
    classes=("background", "stroma", "tumor"), colors=((0, 0, 0), (0, 200, 0), (200, 0, 0)),
)  # fmt: skip
TASK = make_task(CARD)


def area(objects: Objects, index: int) -> float:
    """Summed area of a class: rings are signed, holes negative."""
    total = 0.0
    for i in np.flatnonzero(objects.class_index == index):
        for r in range(objects.object_offsets[i], objects.object_offsets[i + 1]):
            ring = objects.coords[objects.ring_offsets[r] : objects.ring_offsets[r + 1]]
            following = np.roll(ring, -1, axis=0)
            total += 0.5 * float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum())
    return total


@given(st.integers(0, 2**32), st.integers(1, 19), st.integers(1, 19))
@settings(max_examples=40)
def test_cores_cover_every_pixel_once(seed: int, row: int, column: int) -> None:
    """Whatever the cut, each class keeps its area exactly and regions of different cores do not overlap."""
    rng = np.random.default_rng(seed)
    maps = np.repeat(np.repeat(rng.integers(0, 256, (3, 10, 10), np.uint8), 2, 1), 2, 2)
    whole = TASK.interpret(maps, View(0, 0, (0, 0, 40, 40), 2.0, 2.0, 39, 40))
    cores = [(a, c, b, d) for a, b in ((0, 2 * row), (2 * row, 40)) for c, d in ((0, 2 * column), (2 * column, 40))]
    parts = concat([TASK.interpret(maps, View(0, 0, core, 2.0, 2.0, 39, 40)) for core in cores])
    for index in (1, 2):
        assert area(parts, index) == area(whole, index)
    assert (whole.class_index > 0).all()
    assert whole.coords[:, 0].max(initial=0) <= 78


def test_a_region_is_one_valid_polygon_with_its_hole() -> None:
    """A ring of a class round background is drawn with the hole, in level-0 px, anchored at its first px."""
    maps = np.zeros((3, 16, 16), np.uint8)
    maps[0] = 255
    maps[:, 4:12, 4:12] = np.array([0, 255, 0])[:, None, None]
    maps[:, 6:8, 6:8] = np.array([255, 0, 0])[:, None, None]
    found = TASK.interpret(maps, View(0, 0, (0, 0, 32, 32), 0.5, 0.5, 32, 32))
    assert len(found) == 1
    assert found.anchor.tolist() == [[8, 8]]
    assert found.class_index.tolist() == [1]
    rings = [found.coords[a:b] for a, b in zip(found.ring_offsets, found.ring_offsets[1:], strict=False)]
    polygon = shapely.Polygon(rings[0], rings[1:])
    assert polygon.is_valid
    assert polygon.area == (16 * 16 - 4 * 4) * 0.25


def test_unknown_px_are_left_out_of_loss_and_metrics() -> None:
    """Negative truth counts neither for nor against."""
    import torch

    truth = np.full((8, 8), -1)
    truth[:4] = 1
    maps = np.zeros((3, 4, 4), np.uint8)
    maps[1, :2] = 255
    maps[2, 2:] = 255
    assert TASK.metrics([(truth, maps)]) == {"mean_iou": 1.0, "pixel_accuracy": 1.0}
    logits = torch.zeros(1, 3, 4, 4)
    assert abs(float(TASK.loss(logits, TASK.target(truth)[None])) - 1.0) < 1e-5


def test_a_rare_class_can_count_more_and_one_class_costs_nothing() -> None:
    """weight:<class> weighs px by their true class; with all logits 0 the loss is 1 all the same; a task of a single
    class cannot be wrong; where all is unknown gradients are zeros."""
    import torch

    heavy = make_task(CARD.model_copy(update={"params": {"weight:tumor": 9, "smoothing": 0}}))
    plain = make_task(CARD.model_copy(update={"params": {"smoothing": 0}}))
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, 0, 0], target[0, 3] = 2, -1
    logits = torch.zeros(1, 3, 4, 4)
    assert abs(float(heavy.loss(logits, target)) - 1.0) < 1e-6
    logits[:, 0] = 2.0
    chance = torch.log_softmax(torch.tensor([2.0, 0.0, 0.0]), 0)
    expected = -(11 * chance[0] + 9 * chance[2]) / (20 * np.log(3))
    assert abs(float(heavy.loss(logits, target)) - float(expected)) < 1e-6
    assert float(plain.loss(logits, target)) < float(heavy.loss(logits, target))
    one = {"outputs": 1, "classes": ("a",), "colors": ((0, 0, 0),), "params": {"background": -1}}
    single = make_task(CARD.model_copy(update=one))
    alone = torch.randn(1, 1, 4, 4, requires_grad=True)
    for task, truth, x in ((single, target.clamp(max=0), alone), (plain, target * 0 - 1, logits.requires_grad_())):
        loss = task.loss(x, truth)
        loss.backward()
        assert loss.item() == 0.0 and x.grad is not None and not bool(x.grad.any())
