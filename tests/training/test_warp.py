"""One affine for pixels and truth: exact where it copies, aligned where it does not."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from wsi_mmm.errors import ConfigError
from wsi_mmm.tasks.targets import Boxes, Survival
from wsi_mmm.training import warp
from wsi_mmm.training.warp import (
    NO_CHANGE,
    Change,
    cut,
    draw_thetas,
    padded,
    reach,
    rectangles,
    warp_pixels,
    warp_target,
    widened,
)
from wsi_mmm.types import F32, I32, U8

SIZE = 64
COLOURS = np.array([(230, 230, 230), (200, 30, 60), (40, 60, 190), (20, 170, 90)], np.uint8)
CHANGES = st.builds(
    Change, flips=st.booleans(), quarters=st.booleans(), angle=st.sampled_from([0.0, 0.0, 30.0, 180.0]),
    scale=st.sampled_from([0.0, 0.0, 0.3, 2.0]), shift=st.sampled_from([0.0, 0.2]), place=st.booleans(),
)  # fmt: skip
KINDS = ("classify", "multilabel", "regress", "survive", "segment", "multisegment", "instances", "detect")
SEEDS = st.integers(0, 2**60)
EXACT = Change(flips=True, quarters=True, shift=0.3)


def planted(seed: int, height: int, width: int) -> tuple[U8, I32]:
    """Discs of three classes on a ground; the colour of a px is its label."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    y, x = np.mgrid[:height, :width]
    for _ in range(9):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(8, 20)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = rng.integers(1, 4)
    return COLOURS[labels], labels


def uniform(labels: I32) -> npt.NDArray[np.bool_]:
    """Whether all px within two px are of one label."""
    same: npt.NDArray[np.bool_] = ndimage.minimum_filter(labels, 5) == ndimage.maximum_filter(labels, 5)
    return same


def shown(pictures: list[U8], thetas: F32, size: int = SIZE) -> npt.NDArray[np.float32]:
    """What the device makes of pictures: cut, padded, warped; float32[n, size, size, 3] of 0 to 255."""
    cuts = [cut(picture, theta, size) for picture, theta in zip(pictures, thetas, strict=True)]
    batch = padded([pixels for pixels, _ in cuts])
    moved = torch.from_numpy(np.stack([theta for _, theta in cuts]))
    out: npt.NDArray[np.float32] = (warp_pixels(torch.from_numpy(batch), moved, size) * 255).permute(0, 2, 3, 1).numpy()
    return out


@given(CHANGES, SEEDS, st.integers(20, 150), st.integers(20, 150))
def test_pixels_that_are_their_labels_stay_so(change: Change, seed: int, height: int, width: int) -> None:
    """Whatever the warp, each px that lies in the middle of something has the colour of its label, white outside."""
    pictures, labels = zip(*(planted(seed % 97 + i, height, width) for i in range(3)), strict=True)
    thetas = draw_thetas(change, [(height, width)] * 3, size=SIZE, read=64, seed=seed)
    for found, theta, label in zip(shown(list(pictures), thetas), thetas, labels, strict=True):
        wanted = warp_target("segment", label, theta, SIZE)
        assert isinstance(wanted, np.ndarray) and wanted.dtype == np.int32 and wanted.shape == (SIZE, SIZE)
        palette = np.vstack([COLOURS, [(255, 255, 255)]])  # label -1: beyond
        # The nearest px misses a lone one between two discs, the picture shows a trace of it: so both must be uniform.
        around = np.asarray(warp_target("segment", uniform(label).astype(np.int32), theta, SIZE))
        same = uniform(wanted) & (around != 0)
        same[[0, 1, -2, -1]] = same[:, [0, 1, -2, -1]] = False  # what lies beside the crop is not seen here
        assert np.abs(found - palette[wanted])[same].max(initial=0) < 1.0
        whole = np.abs(found - palette[wanted]).max(-1) < 60
        assert whole.mean() > 0.6


@given(SEEDS, st.integers(50, 99), st.integers(50, 99))
def test_turns_flips_and_whole_shifts_copy(seed: int, height: int, width: int) -> None:
    """Every px of the crop is, to the bit, the px that its label comes from; white and -1 beyond."""
    rng = np.random.default_rng(seed)
    shapes = [(height, width), (width, height), (70, 70)]
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    thetas = draw_thetas(EXACT, shapes, size=SIZE, read=70, seed=seed)
    for found, theta, picture in zip(shown(pictures, thetas), thetas, pictures, strict=True):
        number = np.arange(picture.shape[0] * picture.shape[1], dtype=np.int32).reshape(picture.shape[:2])
        where = warp_target("instances", number, theta, SIZE)
        assert isinstance(where, np.ndarray)
        flat = np.vstack([picture.reshape(-1, 3), [(255, 255, 255)]])
        assert (found == flat[where]).all()


def test_no_change_is_exact() -> None:
    """A sample of the crop's size comes back as it went in; a larger one gives its middle; truths likewise."""
    picture, labels = planted(1, SIZE, SIZE)
    thetas = draw_thetas(NO_CHANGE, [(SIZE, SIZE), (SIZE + 10, SIZE + 20)], size=SIZE, read=SIZE, seed=5)
    assert thetas[0].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert (shown([picture], thetas[:1])[0] == picture).all()
    larger = np.pad(picture, ((5, 5), (10, 10), (0, 0)))
    assert (shown([larger], thetas[1:])[0] == picture).all()
    assert (warp_target("segment", labels, thetas[0], SIZE) == labels).all()
    boxes = Boxes(np.array([[3, 4, 20, 30.5]], np.float32), np.array([2], np.int32), SIZE, SIZE)
    same = warp_target("detect", boxes, thetas[0], SIZE)
    assert isinstance(same, Boxes)
    assert same.xyxy.tolist() == boxes.xyxy.tolist() and same.labels.tolist() == [2]


@settings(max_examples=60)
@given(CHANGES, SEEDS)
def test_boxes_of_rectangles_are_the_bounds_of_their_masks(change: Change, seed: int) -> None:
    """A rectangle's box, moved, is the bounds of its moved mask within a px, cut at the crop's rim."""
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, 70, 2)
    w, h = rng.integers(12, 40, 2)
    mask = np.zeros((1, 100, 120), np.int8)
    mask[0, y0 : y0 + h, x0 : x0 + w] = 1
    bounds = np.array([[x0, y0, min(120, x0 + w), min(100, y0 + h)]], np.float32)
    boxes = Boxes(bounds, np.array([1], np.int32), 100, 120)
    (theta,) = draw_thetas(change, [(100, 120)], size=SIZE, read=SIZE, seed=seed)
    moved, there = (
        warp_target("detect", boxes, theta, SIZE, visible=0.0),
        warp_target("multisegment", mask, theta, SIZE),
    )
    assert isinstance(moved, Boxes) and isinstance(there, np.ndarray) and there.dtype == np.int8
    ys, xs = np.nonzero(there[0] == 1)
    known = moved.xyxy[moved.labels >= 0]
    if len(xs) > 30 and (change.angle == 0 or _uncut(known)):  # a turned and cut one: its box is that of the whole, cut
        assert len(known) == 1
        assert np.abs(known[0] - (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)).max() <= 1.0 + 1e-4
    if not len(known):
        assert not len(xs)


def _uncut(xyxy: F32) -> bool:
    return bool(len(xyxy) and (xyxy > 0).all() and (xyxy < SIZE).all())


@settings(max_examples=60)
@given(CHANGES, SEEDS)
def test_unknown_boxes_cover_what_lies_beyond(change: Change, seed: int) -> None:
    """Boxes labelled -1 cover the px beyond the sample, all of them where angles are right, and none of the sample."""
    nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 50, 70)
    (theta,) = draw_thetas(change, [(50, 70)], size=SIZE, read=SIZE, seed=seed)
    moved = warp_target("detect", nothing, theta, SIZE)
    beyond = np.asarray(warp_target("segment", np.zeros((50, 70), np.int32), theta, SIZE)) < 0
    assert isinstance(moved, Boxes) and (moved.labels == -1).all()
    covered = np.zeros((SIZE, SIZE), bool)
    for x0, y0, x1, y1 in moved.xyxy.astype(int).tolist():
        covered[y0:y1, x0:x1] = True
    assert not (covered & ~beyond).any()
    if change.angle == 0:
        assert (covered == beyond).all()
    elif beyond.sum() > 1000:
        assert covered.sum() > 0.5 * beyond.sum()


def test_a_box_that_hardly_shows_is_unknown_and_one_outside_is_gone() -> None:
    """Half in: kept and clipped; a tenth in: labelled -1; outside: not there."""
    theta = np.array([[1, 0, 10], [0, 1, 0]], np.float32)
    xyxy = np.array([[0, 5, 20, 15], [-8, 30, 11, 40], [0, 50, 9, 60]], np.float32)
    found = warp_target("detect", Boxes(xyxy, np.array([0, 1, 2], np.int32), 200, 200), theta, SIZE)
    assert isinstance(found, Boxes)
    assert found.xyxy.tolist() == [[0, 5, 10, 15], [0, 30, 1, 40]]
    assert found.labels.tolist() == [0, -1]


def test_what_is_no_picture_stays() -> None:
    """Classes, numbers, times and nothing at all are no matter of geometry."""
    theta = np.array([[0, 1, 3], [1, 0, 2]], np.float32)
    times = Survival(3.0, True)
    assert warp_target("classify", 3, theta, SIZE) == 3
    assert warp_target("survive", times, theta, SIZE) is times
    assert warp_target("reconstruct", None, theta, SIZE) is None


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_truths_are_unknown(kind: str) -> None:
    """Each kind's unknown, as `tasks.targets` says, and of the crop's shape."""
    target = warp.unknown_target(kind, 3, 8)
    if isinstance(target, Survival):
        assert math.isnan(target.time)
    elif isinstance(target, Boxes):
        assert target.labels.tolist() == [-1] and target.xyxy.tolist() == [[0, 0, 8, 8]]
    else:
        values = np.asarray(target, np.float64)
        assert np.isnan(values).all() or (values < 0).all()
        shapes = {"segment": (8, 8), "instances": (2, 8, 8), "multisegment": (3, 8, 8), "classify": ()}
        assert values.shape == shapes.get(kind, (3,))


@given(CHANGES, SEEDS, st.sampled_from([0, 8]))
def test_a_sample_of_the_reach_holds_every_crop(change: Change, seed: int, margin: int) -> None:
    """Read as large as `reach` says, no crop (with its margin) looks beyond its sample."""
    read = reach(change, SIZE, margin)
    assert (read - SIZE) % 2 == 0
    thetas = draw_thetas(change, [(read, read)] * 8, size=SIZE, read=read, seed=seed)
    for theta in thetas:
        wide = widened(theta, margin)
        if change.angle <= 45:
            there = warp_target("segment", np.zeros((read, read), np.int32), wide, SIZE + 2 * margin)
            assert (np.asarray(there) == 0).all()


def test_a_margin_is_the_same_crop_with_more_round_it() -> None:
    """The middle of the widened crop is the crop."""
    _, labels = planted(4, 120, 120)
    thetas = draw_thetas(Change(angle=20, scale=0.2), [(120, 120)] * 6, size=SIZE, read=120, seed=3)
    for theta in thetas:
        wide = np.asarray(warp_target("segment", labels, widened(theta, 16), SIZE + 32))
        assert (wide[16:-16, 16:-16] == np.asarray(warp_target("segment", labels, theta, SIZE))).mean() > 0.998


def test_draws_do_not_depend_on_the_others() -> None:
    """Sample 1 gets the same warp whatever is read of sample 0."""
    change = Change(angle=10, scale=0.1)
    one = draw_thetas(change, [(80, 80), (90, 70)], size=SIZE, read=80, seed=9)
    two = draw_thetas(change, [(120, 99), (90, 70)], size=SIZE, read=80, seed=9)
    assert (one[1] == two[1]).all() and (one[0] != two[0]).any()


def test_scaling_down_does_not_alias() -> None:
    """Stripes of one px, shrunk five times, become grey; a picture of nothing becomes nothing."""
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    theta = np.array([[[5, 0, 40.3], [0, 5, 40.2]]], np.float32)
    grey = shown([stripes], theta)[0][2:-2, 2:-2]
    assert np.abs(grey - 127.5).max() < 30
    sharp = np.abs(shown([stripes], np.array([[[0.9, 0, 40.3], [0, 0.9, 40.2]]], np.float32)) - 127.5)
    assert sharp.max() > 100  # the same stripes are there when they are not shrunk
    assert warp_pixels(torch.zeros((0, 1, 1, 3), dtype=torch.uint8), torch.zeros((0, 2, 3)), SIZE).shape == (
        0,
        3,
        64,
        64,
    )


def test_what_is_cut_is_all_that_is_needed() -> None:
    """Warping the cut part equals warping the whole picture, and the part is small."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (300, 400, 3), np.uint8)
    for change in (EXACT, Change(angle=45, scale=0.5)):
        thetas = draw_thetas(change, [picture.shape[:2]] * 5, size=32, read=32, seed=1)
        whole = warp_pixels(torch.from_numpy(np.stack([picture] * 5)), torch.from_numpy(thetas), 32)
        whole_255 = (whole * 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(shown([picture] * 5, thetas, 32) - whole_255).max() < (0.05 if change.angle else 1e-9)
        assert max(cut(picture, theta, 32)[0].shape[0] for theta in thetas) < 90


@pytest.mark.parametrize("bad", [{"angle": -1.0}, {"scale": 8.0}, {"shift": 1.5}, {"angle": float("nan")}])
def test_changes_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    """Negative or absurd amounts."""
    with pytest.raises(ConfigError, match="change: angle"):
        Change(**bad)  # type: ignore[arg-type]


def test_a_batch_may_hold_all_sorts_of_warps() -> None:
    """Copies, free turns and shrunk pictures in one batch come out as each does alone."""
    rng = np.random.default_rng(2)
    pixels = torch.from_numpy(rng.integers(0, 256, (4, 90, 90, 3), np.uint8))
    thetas = np.zeros((4, 2, 3), np.float32)
    thetas[0] = [[0, -1, 80], [1, 0, 3]]
    thetas[1] = [[0.9, 0.3, 1.5], [-0.3, 0.9, 20]]
    thetas[2] = [[4, 0, -20], [0, 4, -30]]
    thetas[3] = [[-1, 0, 70], [0, 1, 0]]
    together = warp_pixels(pixels, torch.from_numpy(thetas), 32)
    for i in range(4):
        assert torch.equal(together[i : i + 1], warp_pixels(pixels[i : i + 1], torch.from_numpy(thetas[i : i + 1]), 32))
    with pytest.raises(ValueError, match="one warp for each"):
        warp_pixels(pixels, torch.from_numpy(thetas[:2]), 32)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_rectangles_cover_a_mask_once(seed: int, share: float) -> None:
    """Every True cell in exactly one rectangle, no False cell in any."""
    mask = np.random.default_rng(seed).random((13, 17)) < share
    count = np.zeros(mask.shape, int)
    for x0, y0, x1, y1 in rectangles(mask).astype(int):
        count[y0:y1, x0:x1] += 1
    assert (count == mask).all()
