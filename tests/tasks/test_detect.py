"""The `detect` task: boxes without anchors, the same for any way of cutting the plane, judged as COCO judges."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_mmm.model.card import TaskCard
from wsi_mmm.outputs.polygons import concat
from wsi_mmm.tasks import View, make_task, metrics, peaks
from wsi_mmm.tasks.detect import Detect
from wsi_mmm.tasks.targets import Boxes
from wsi_mmm.types import F64, U8, Objects

CARD = TaskCard(
    name="cells", kind="detect", head="dense", outputs=6, classes=("a", "b"), colors=((0, 160, 80), (160, 0, 0))
)
TASK = make_task(CARD)
assert isinstance(TASK, Detect)
ONE = make_task(CARD.model_copy(update={"outputs": 5, "classes": ("a",), "colors": ((0, 0, 0),)}))
SCALE = 1.9873


def boxes(rng: np.random.Generator, count: int, side: int, *, low: float = 10.0, high: float = 40.0) -> Boxes:
    """Boxes of two classes whose middles are at least 14 px apart."""
    middles: list[F64] = []
    while len(middles) < count:
        one = rng.uniform(20, side - 20, 2)
        if all(np.abs(one - other).max() >= 14 for other in middles):
            middles.append(one)
    half = rng.uniform(low / 2, high / 2, (count, 2))
    middle = np.array(middles).reshape(-1, 2)
    xyxy = np.concatenate([middle - half, middle + half], axis=1).clip(0, side).astype(np.float32)
    return Boxes(xyxy, rng.integers(0, 2, count).astype(np.int32), side, side)


def perfect(truth: Boxes, task: Detect = TASK) -> U8:
    """The bytes of a head that says just what the target says."""
    import torch

    from wsi_mmm.tasks.losses_dense import PRIOR

    target = task.target(truth)
    heat, count = target[: task.channels - 4].nan_to_num(0.0), task.channels - 4
    logits = torch.cat([torch.logit(heat.clamp(1e-4, 1 - 1e-4)) - PRIOR, target[count : count + 4]])
    return task.quantise(logits[None])[0].numpy()


def interpret(maps: U8, core: tuple[int, int, int, int], size: tuple[int, int], task: Detect = TASK) -> Objects:
    """Interpretation of one core from a window that has just the halo it asks for."""
    y0, x0 = (max(0, core[i] - task.halo) // 4 * 4 for i in (0, 1))
    y1, x1 = (min(-(-size[i] // 4) * 4, core[i + 2] + task.halo) for i in (0, 1))
    window = np.ascontiguousarray(maps[:, y0 // 4 : -(-y1 // 4), x0 // 4 : -(-x1 // 4)])
    return task.interpret(window, View(y0, x0, core, SCALE, SCALE, size[1], size[0]))


def canonical(objects: Objects) -> list[tuple[bytes, ...]]:
    """One entry per box, in the order of the anchors."""
    order = np.lexsort((objects.anchor[:, 1], objects.anchor[:, 0]))
    corners, chance = objects.coords.reshape(-1, 8), objects.measurements["probability"]
    return [
        (objects.anchor[i].tobytes(), corners[i].tobytes(), chance[i].tobytes(), bytes([objects.class_index[i]]))
        for i in order
    ]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[U8, tuple[int, int], list[int], list[int]]:
    """Maps that no network would give, of a plane of a size in target px, and cuts of it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width = draw(st.integers(8, 500)), draw(st.integers(8, 500))
    shape = (-(-height // 4), -(-width // 4))
    maps = rng.integers(0, 256, (6, *shape), np.uint8)
    kind = draw(st.sampled_from(["wild", "plateaus", "large", "sparse"]))
    if kind == "plateaus":
        maps[:2] = rng.integers(0, 3, maps[:2].shape) * 127
        maps[2:] = rng.integers(60, 140, maps[2:].shape)
    elif kind == "large":
        maps[2:] = rng.integers(150, 256, maps[2:].shape)
    elif kind == "sparse":
        maps[:2] *= rng.random(maps[:2].shape) > 0.98
    cuts = []
    for size in (height, width):
        inner = draw(st.lists(st.integers(1, max(1, size // 4)), max_size=2, unique=True))
        cuts.append([0, *sorted(4 * i for i in inner if 4 * i < size), -(-size // 4) * 4])
    return maps, (height, width), cuts[0], cuts[1]


@given(scenes(), st.sampled_from([0.05, 0.4, 0.9]))
@settings(max_examples=40)
def test_any_partition_into_cores_gives_the_same_boxes(
    scene: tuple[U8, tuple[int, int], list[int], list[int]], overlap: float
) -> None:
    """Boxes found core by core, each with its halo only, are those of the whole plane to the last bit, each once."""
    maps, size, rows, columns = scene
    task = replace(TASK, overlap=overlap)
    whole = interpret(maps, (0, 0, rows[-1], columns[-1]), size, task)
    cores = [(a, c, b, d) for a, b in pairwise(rows) for c, d in pairwise(columns)]
    parts = concat([interpret(maps, core, size, task) for core in cores])
    assert canonical(parts) == canonical(whole)
    assert len(np.unique(whole.anchor, axis=0)) == len(whole)
    assert whole.coords.min(initial=0) >= 0
    assert (whole.coords <= np.array([size[1], size[0]]) * SCALE).all()


@given(st.integers(0, 2**32), st.floats(6, 60), st.floats(6, 200))
@settings(max_examples=40)
def test_a_box_comes_back_from_its_target(seed: int, low: float, high: float) -> None:
    """Target, perfect logits, bytes, boxes: every box comes back with its class, each side within 3 % of its distance
    from the centre (a byte's step) and half a px."""
    rng = np.random.default_rng(seed)
    truth = boxes(rng, 1, 256, low=min(low, high), high=max(low, high))
    found = peaks.boxes_of(perfect(truth), (0, 0), threshold=128, overlap=0.4)
    assert found.kind.tolist() == truth.labels.tolist()
    side = max(truth.xyxy[0, 2:] - truth.xyxy[0, :2])
    assert np.abs(found.xyxy - truth.xyxy).max() <= 0.5 + 0.03 * side


def test_what_is_perfect_scores_one_and_blank_maps_score_nothing() -> None:
    """AP and F1 are 1 for bytes made from the truth, 0 for none; nothing to find and nothing found is 1."""
    rng = np.random.default_rng(0)
    truth = [boxes(rng, 30, 512), boxes(rng, 5, 256)]
    good = TASK.metrics([(one, perfect(one)) for one in truth])
    assert good == {"ap50": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0}
    blank = np.zeros((6, 64, 64), np.uint8)
    assert TASK.metrics([(truth[1], blank)])["ap50"] == 0.0
    nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 256, 256)
    assert TASK.metrics([(nothing, blank)]) == {"ap50": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0}


def test_unknown_areas_are_neither_learnt_nor_judged() -> None:
    """Heat is NaN there but at known centres; logits there change no loss; boxes found there do not count."""
    import torch

    rng = np.random.default_rng(1)
    known = boxes(rng, 12, 256)
    clear = (known.xyxy[:, 0] >= 128) | (known.xyxy[:, 2] <= 128)
    known = replace(known, xyxy=known.xyxy[clear], labels=known.labels[clear])
    area = np.array([[0, 0, 128, 256]], np.float32)
    half = known.xyxy[:, 0] >= 128
    part = Boxes(np.concatenate([known.xyxy[half], area]), np.append(known.labels[half], -1).astype(np.int32), 256, 256)
    target = TASK.target(part)
    assert torch.isnan(target[:2, :, :32]).all() and not torch.isnan(target[:2, :, 32:]).any()
    logits = torch.randn(1, 6, 64, 64, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[..., :31] += 5.0
    assert torch.equal(TASK.loss(logits, target[None]), TASK.loss(other, target[None]))
    assert TASK.metrics([(part, perfect(known))])["precision"] == 1.0
    one = known.xyxy[:1]
    inside = Boxes(np.concatenate([one, one + np.array([-20, -20, 20, 20])]), np.array([0, -1], np.int32), 256, 256)
    assert (TASK.target(inside)[0] == 1.0).sum() == 1


def test_the_loss_is_one_for_who_knows_nothing_and_falls_for_who_knows() -> None:
    """Zero logits cost about 1 with two classes, with one, and without any object; perfect ones next to nothing;
    all-unknown pictures cost nothing and leave zero gradients."""
    import torch

    rng = np.random.default_rng(2)
    truth = [boxes(rng, 20, 256), boxes(rng, 3, 256)]
    target = torch.stack([TASK.target(one) for one in truth])
    flat = torch.zeros(2, 6, 64, 64)
    assert 0.6 < float(TASK.loss(flat, target)) < 1.4
    best = torch.cat([torch.where(target[:, :2] == 1, 8.0, -8.0), target[:, 2:6]], dim=1)
    assert float(TASK.loss(best, target)) < 0.01
    single = ONE.target(replace(truth[0], labels=np.zeros(20, np.int32)))[None]
    assert 0.6 < float(ONE.loss(torch.zeros(1, 5, 64, 64), single)) < 1.4
    nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 256, 256)
    assert float(TASK.loss(flat, torch.stack([TASK.target(nothing)] * 2))) == pytest.approx(0.6)
    unknown = Boxes(np.array([[0, 0, 256, 256]], np.float32), np.array([-1], np.int32), 256, 256)
    flat.requires_grad_()
    loss = TASK.loss(flat, torch.stack([TASK.target(unknown)] * 2))
    loss.backward()
    assert loss.item() == 0.0 and flat.grad is not None and not bool(flat.grad.any())


def test_a_class_that_the_task_lacks_is_refused() -> None:
    """A label beyond the classes is a mistake of the data, not background."""
    with pytest.raises(ValueError, match="class 2, the task has 2"):
        TASK.target(Boxes(np.array([[0, 0, 9, 9]], np.float32), np.array([2], np.int32), 64, 64))


def test_every_object_has_the_same_say_about_sides() -> None:
    """Weights are 1 in sum per object, large or small; where objects lie on each other the smaller one is learnt."""
    truth = Boxes(
        np.array([[0, 0, 200, 200], [90, 90, 110, 110], [220, 220, 230, 230]], np.float32),
        np.zeros(3, np.int32),
        256,
        256,
    )
    target = TASK.target(truth).numpy()
    assert target[6].sum() == pytest.approx(3.0, abs=1e-5)
    middle = 2.0 ** target[2:6, 25, 25] * TASK.size / 2
    assert middle == pytest.approx([12, 12, 8, 8])


def test_of_overlapping_boxes_the_better_centre_stays() -> None:
    """Two like boxes beside each other: one, the better; far apart or of little overlap: both; equals: the upper."""
    maps = np.zeros((5, 40, 40), np.uint8)
    maps[1:] = 133  # 20 px each way
    maps[0, 10, 10], maps[0, 10, 12], maps[0, 30, 30], maps[0, 20, 10] = 200, 220, 200, 200
    found = peaks.boxes_of(maps, (0, 0), threshold=100, overlap=0.4)
    assert found.anchor.tolist() == [[42, 50], [82, 42], [122, 122]]
    maps[0, 10, 10] = 220
    assert peaks.boxes_of(maps, (0, 0), threshold=100, overlap=0.4).anchor[0].tolist() == [42, 42]


def test_one_hundred_thousand_objects_take_seconds() -> None:
    """A plane with 1e5 boxes of nuclei's size, as one window: found once each, time and memory not of their square."""
    rng = np.random.default_rng(3)
    maps = np.zeros((5, 1100, 1100), np.uint8)
    maps[0, 2:-2:3, 2:-2:3] = rng.integers(100, 256, (366, 366))
    maps[1:] = rng.integers(80, 100, maps[1:].shape)  # 5 to 8 px each way
    began = time.process_time()
    found = peaks.boxes_of(maps, (0, 0), threshold=100, overlap=0.4)
    assert len(found.score) > 100_000
    assert time.process_time() - began < 20


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    """AP at IoU 0.5 per class, over pictures with misses, doubles, wrong classes and unknown areas."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(seed)
    pairs = [_noisy(rng) for _ in range(5)]
    ours = [metrics.average_precision(metrics.match_boxes(pairs, kind)) for kind in (0, 1)]
    truths, found = coco.COCO(), []
    annotations = []
    for image, (truth, boxes_) in enumerate(pairs):
        for box, label in zip(truth.xyxy.tolist(), truth.labels.tolist(), strict=True):
            for kind in (0, 1) if label < 0 else (label,):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image, "category_id": kind, "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": int(label < 0),
                })  # fmt: skip
        for box, score, kind in zip(boxes_.xyxy.tolist(), boxes_.score.tolist(), boxes_.kind.tolist(), strict=True):
            found.append({
                "image_id": image, "category_id": kind, "score": score,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            })  # fmt: skip
    truths.dataset = {
        "images": [{"id": i} for i in range(5)], "annotations": annotations, "info": {},
        "categories": [{"id": 0}, {"id": 1}],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truths.createIndex()
        judge = cocoeval.COCOeval(truths, truths.loadRes(found), "bbox")
        judge.params.iouThrs, judge.params.maxDets = np.array([0.5]), [1, 10, 10_000]
        judge.evaluate()
        judge.accumulate()
    theirs = judge.eval["precision"][0, :, :, 0, -1].mean(axis=0)
    assert ours == pytest.approx(theirs.tolist(), abs=1e-9)
    assert min(ours) > 0.2 and max(ours) < 0.98


def _noisy(rng: np.random.Generator) -> tuple[Boxes, peaks.FoundBoxes]:
    """True boxes, two unknown areas, and detections: most true ones shifted, some doubled, others out of the air."""
    truth = boxes(rng, 40, 512)
    shift = rng.normal(0, 2.5, (40, 4))
    near = truth.xyxy + shift
    double = near[:10] + rng.normal(0, 1, (10, 4))
    for some in (near, double):
        some[:, 2:] = np.maximum(some[:, 2:], some[:, :2] + 2)
    corner = rng.uniform(0, 480, (20, 2))
    xyxy = np.concatenate([near[:35], double, np.concatenate([corner, corner + rng.uniform(8, 40, (20, 2))], axis=1)])
    kind = np.concatenate([truth.labels[:35], truth.labels[:10], rng.integers(0, 2, 20)]).astype(np.int32)
    kind[:3] = 1 - kind[:3]
    score = rng.permutation(len(xyxy)).astype(np.int32)  # no ties: their order is nobody's rule
    areas = np.array([[0, 0, 120, 120], [300, 300, 420, 380]], np.float32)
    whole = Boxes(
        np.concatenate([truth.xyxy, areas]), np.concatenate([truth.labels, [-1, -1]]).astype(np.int32), 512, 512
    )
    return whole, peaks.FoundBoxes(np.zeros((len(xyxy), 2), np.int64), xyxy, score, kind)
