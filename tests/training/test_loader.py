"""From sources to batches: aligned truths, failures counted, the same whatever the threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.annotation_targets import joint
from helpers.faulty import Faulty
from helpers.memory_source import COLOURS, MemorySource, bag_source, picture_source
from helpers.training import batch as noise_batch
from helpers.training import tiny
from wsi_mmm.errors import ConfigError, StorageError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.slides.base import Fetched
from wsi_mmm.slides.tiff.reader import TiffReader
from wsi_mmm.tasks import Task, make_task
from wsi_mmm.training import fit as fitting
from wsi_mmm.training import job
from wsi_mmm.training.augment import Augment
from wsi_mmm.training.config import parse
from wsi_mmm.training.data.base import FetchedItems, Sample
from wsi_mmm.training.data.slides import SlideItem, SlideTiles, TileSampling, slide_tiles
from wsi_mmm.training.fit import FitPlan, StepReport, TrainingListener, fit
from wsi_mmm.training.forward import TrainingContext
from wsi_mmm.training.loader import (
    FETCHES,
    READ_AHEAD,
    DataFeed,
    LoadPlan,
    TrainBatch,
    batches,
    make_preprocess,
    mixed,
    pictures,
    together,
)
from wsi_mmm.training.optim import OptimPlan
from wsi_mmm.training.policy import key_of
from wsi_mmm.training.strategies import StrategyInputs, StrategyPlan, make_strategy
from wsi_mmm.training.warp import NO_CHANGE, Change
from wsi_mmm.types import Tiles


def task(name: str, kind: str, head: str, classes: int = 4) -> Task:
    names = tuple(f"c{i}" for i in range(classes))
    outputs = 4 if kind == "instances" else classes
    return make_task(
        TaskCard(name=name, kind=kind, head=head, outputs=outputs, classes=names, colors=((0, 0, 0),) * classes)  # type: ignore[arg-type]
    )


TASKS = {
    "discs": task("discs", "segment", "map"),
    "class": task("class", "classify", "vector", 3),
    "grade": task("grade", "classify", "bag", 2),
    "nuclei": task("nuclei", "instances", "map", 1),
    "tags": task("tags", "multilabel", "vector", 3),
}
PLAN = LoadPlan(32, seed=4, change=Change(angle=20, scale=0.2))
KNOWN = {"discs": None, "class": None}


def some(source: MemorySource, count: int = 1, plan: LoadPlan = PLAN, **more: object) -> list[TrainBatch]:
    feed = DataFeed(source, 4, **more)  # type: ignore[arg-type]
    return [batch for step in batches([feed], TASKS, plan=plan, steps=range(count)) for batch in step]


def same(a: TrainBatch, b: TrainBatch) -> bool:
    """Equal to the bit."""
    tensors = zip(
        (*a.tensors(), *([] if a.theta is None else [a.theta])),
        (*b.tensors(), *([] if b.theta is None else [b.theta])),
        strict=True,
    )
    equal = all(torch.equal(x.nan_to_num(-9), y.nan_to_num(-9)) for x, y in tensors)
    return equal and (a.feed, a.keys, a.seed, a.failed) == (b.feed, b.keys, b.seed, b.failed)


def feeds() -> list[DataFeed]:
    """Two of pictures, one of bags of features, one of bags of tiles; even items are slow."""
    return [
        DataFeed(picture_source("a", 7, targets=KNOWN, wait=0.004, broken=frozenset({"a-2"})), 4),
        DataFeed(picture_source("b", 3, targets={"class": None}), 2),
        DataFeed(bag_source("c", (2, 3, 1)), 2),
        DataFeed(replace(bag_source("d", (2, 3, 1), tiles=40), tasks=("grade",)), 2),
    ]


def test_the_threads_do_not_matter() -> None:
    """Without threads, with one and with four: the same steps to the bit, in order; resuming gives the same as well."""
    ways = [list(batches(feeds(), TASKS, plan=replace(PLAN, threads=n), steps=range(6))) for n in (0, 1, 4)]
    late = list(batches(feeds(), TASKS, plan=PLAN, steps=range(3, 6)))
    for way in (*ways[1:], ways[0][:3] + late):
        assert [len(step) for step in way] == [4] * 6
        assert all(same(x, y) for one, two in zip(ways[0], way, strict=True) for x, y in zip(one, two, strict=True))
    assert not same(ways[0][0][0], ways[0][1][0])


def test_pixels_and_targets_are_of_one_crop() -> None:
    """Through reading, cutting, padding and warping, px keep the colour of their label; beyond there is white."""
    colours = torch.from_numpy(np.vstack([COLOURS, [(255, 255, 255)]]).astype(np.float32) / 255)
    for batch in some(picture_source("a", 9, size=40, targets=KNOWN), 3):
        x, labels = pictures(batch).permute(0, 2, 3, 1), batch.targets["discs"]
        assert x.shape == (4, 32, 32, 3) and labels.shape == (4, 16, 16)
        near = (x[:, 1::2, 1::2, None] - colours).square().sum(-1).argmin(-1)  # a target px is the lower right of four
        assert (near == labels % 5).float().mean() > 0.88
        assert batch.targets["class"].tolist() == [int(key.removeprefix("a-")) % 3 for key in batch.keys]
        assert (labels >= 0).any() and batch.size == 32


def test_validation_sees_the_middle_unchanged() -> None:
    """Without change: the very px of the middle of each picture, without augmentation."""
    source = picture_source("a", 4, size=48, targets=KNOWN)
    (batch,) = some(source, plan=LoadPlan(32, change=NO_CHANGE))
    for key, found in zip(batch.keys, pictures(batch), strict=True):
        pixels = source.samples[int(key.removeprefix("a-"))].pixels
        assert pixels is not None
        assert ((found.permute(1, 2, 0) * 255).numpy() == pixels[8:40, 8:40]).all()


def test_unequal_pictures_share_a_tensor() -> None:
    """Pictures smaller than the crop are padded with white."""
    rng = np.random.default_rng(0)
    shapes = ((10, 30), (25, 12), (40, 50), (32, 32))
    samples = tuple(Sample(f"{i}", rng.integers(0, 200, (*s, 3), np.uint8)) for i, s in enumerate(shapes))
    source = MemorySource("a", samples, (0,) * 4, ("discs",))
    (batch,) = some(source, plan=LoadPlan(32, change=NO_CHANGE))
    assert batch.pixels is not None
    for key, held in zip(batch.keys, batch.pixels, strict=True):
        h, w = (min(32, side) for side in shapes[int(key)])
        assert (held[h:] == 255).all() and (held[:, w:] == 255).all() and (held[:h, :w] < 255).all()
    assert (batch.targets["discs"] == -1).all()


def test_what_cannot_be_read_is_left_out_and_named() -> None:
    """Others of the batch get the very crops that they get otherwise; a batch of failures is empty; all are named."""
    good, bad = picture_source("a", 4, targets=KNOWN), picture_source("a", 4, targets=KNOWN, broken=frozenset({"a-1"}))
    (whole,), (part,) = some(good), some(bad)
    assert part.failed == ("a-1: damaged",)
    assert part.keys == tuple(key for key in whole.keys if key != "a-1")
    kept = [i for i, key in enumerate(whole.keys) if key != "a-1"]
    assert torch.equal(pictures(part), pictures(whole)[kept])
    assert torch.equal(part.targets["discs"], whole.targets["discs"][kept])
    none = picture_source("a", 4, targets=KNOWN, broken=frozenset(f"a-{i}" for i in range(4)))
    both = [DataFeed(none, 4), DataFeed(bag_source("c", (1, 2)), 2)]
    found = [b for step in batches(both, TASKS, plan=PLAN, steps=range(3)) for b in step]
    assert [len(batch) for batch in found] == [0, 2] * 3 and found[0].targets == {} and found[0].pixels is None
    assert [len(batch.failed) for batch in found] == [4, 0] * 3 and found[0].failed[0].endswith(": damaged")


def test_bags_are_ragged() -> None:
    """All vectors (or tiles) of the bags one after another, which bag each is of, one target for each bag."""
    source = bag_source("c", (2, 5, 1, 3))
    (batch,) = some(source)
    sizes = [len(source.samples[int(key.removeprefix("c-"))].xy) for key in batch.keys]  # type: ignore[arg-type]
    assert batch.bag is not None and batch.vectors is not None and batch.pixels is None
    assert batch.bag.tolist() == [i for i, k in enumerate(sizes) for _ in range(k)]
    for i, key in enumerate(batch.keys):
        wanted = source.samples[int(key.removeprefix("c-"))].vectors
        assert wanted is not None and (batch.vectors[batch.bag == i].numpy() == wanted).all()
    assert batch.targets["grade"].tolist() == [int(key.removeprefix("c-")) % 2 for key in batch.keys]
    (tiles,) = some(bag_source("d", (2, 5, 1, 3), tiles=32), plan=LoadPlan(32))
    assert tiles.bag is not None and tiles.bag.bincount().tolist() == sizes_of(tiles, (2, 5, 1, 3))
    assert pictures(tiles).shape == (11, 3, 32, 32) and tiles.vectors is None


def sizes_of(batch: TrainBatch, sizes: tuple[int, ...]) -> list[int]:
    return [sizes[int(key.rsplit("-", 1)[1])] for key in batch.keys]


def test_no_truth_is_an_unknown_target_of_the_right_shape() -> None:
    """Tasks of the source that know nothing of an item: their targets stack with the others and teach nothing."""
    source = picture_source("a", 4, targets={"discs": None, "class": None})
    samples = tuple(replace(s, targets={} if i % 2 else s.targets) for i, s in enumerate(source.samples))
    (batch,) = some(replace(source, samples=samples, tasks=("discs", "class", "nuclei", "tags")))
    unknown = torch.tensor([int(key[-1]) % 2 == 1 for key in batch.keys])
    assert (batch.targets["discs"][unknown] == -1).all() and (batch.targets["class"][unknown] == -1).all()
    assert (batch.targets["class"][~unknown] >= 0).all()
    assert batch.targets["tags"].isnan().all() and batch.targets["tags"].shape == (4, 3)
    assert batch.targets["nuclei"].shape == (4, 5, 16, 16) and batch.targets["nuclei"].isnan().all()
    for name in ("nuclei", "tags"):
        logits = torch.randn(4, *((4, 16, 16) if name == "nuclei" else (3,)))
        assert float(TASKS[name].loss(logits, batch.targets[name])) == 0.0


def test_objects_at_the_rim_keep_their_true_middle() -> None:
    """The target of instances is that of a larger crop, cut: offsets point to middles that lie beyond the crop."""
    labels = np.zeros((96, 96), np.int32)
    labels[40:56, 20:44] = 7  # its middle (32, 48) is at the left rim of the middle crop; a half of it is cut off
    sample = Sample("a-0", np.full((96, 96, 3), 200, np.uint8), targets={"nuclei": labels})
    source = MemorySource("a", (sample,), (0,), ("nuclei",))
    (batch,) = some(source, plan=LoadPlan(32, change=NO_CHANGE))
    assert source.asked == [96]
    target = batch.targets["nuclei"][0]
    assert target.shape == (5, 16, 16)
    inside = target[0] > 0
    assert inside[4:12, :6].all() and inside.sum() == 48
    assert (target[2][inside] < 0).all()  # all of it lies to the right of the true middle


def test_ranks_get_the_plan_between_them() -> None:
    """Three ranks have four micro-batches of a step between them, each the one that a single process has."""
    whole = next(batches(feeds(), TASKS, plan=PLAN, steps=range(5, 6)))
    parts = [next(batches(feeds(), TASKS, plan=replace(PLAN, rank=r, world=3), steps=range(5, 6))) for r in range(3)]
    assert [len(part) for part in parts] == [2, 1, 1]
    for rank, part in enumerate(parts):
        assert all(same(x, y) for x, y in zip(part, whole[rank::3], strict=True))


def test_reading_ahead_is_bounded_and_ends() -> None:
    """No more micro-batches are begun than the threads and the allowance; closing leaves no thread behind."""
    source = picture_source("a", 64, targets=KNOWN)
    before = threading.active_count()
    steps = batches([DataFeed(source, 1)], TASKS, plan=replace(PLAN, threads=2), steps=range(60))
    next(steps)
    assert threading.active_count() == before + 2
    steps.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(source.asked) <= 2 + READ_AHEAD + 1


def test_threads_that_make_batches_compute_on_one_core_and_no_others() -> None:
    """Also after the first batch; a thread that the host process begins meanwhile has the cores of the process."""
    seen: list[int] = []

    class Watched(MemorySource):
        def read(self, numbers: object, size: int) -> list[Sample]:
            seen.append(torch.get_num_threads())
            return super().read(numbers, size)  # type: ignore[arg-type]

    base, before = picture_source("a", 8, targets=KNOWN), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        source = Watched("a", base.samples, base.labels, base.tasks)
        steps = batches([DataFeed(source, 2)], TASKS, plan=replace(PLAN, threads=2), steps=range(9))
        next(steps)
        other: list[int] = []
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        list(steps)
        assert set(seen) == {1} and len(seen) == 9 and other == [3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_source_comes_in_its_turn() -> None:
    """The steps before it are given; then the error itself, and no thread is left."""

    class Full(MemorySource):
        def read(self, numbers: object, size: int) -> list[Sample]:
            if len(self.asked) == 3:
                raise StorageError("the disk is gone")
            return super().read(numbers, size)  # type: ignore[arg-type]

    base = picture_source("a", 8, targets=KNOWN)
    source = Full("a", base.samples, base.labels, base.tasks)
    steps = batches([DataFeed(source, 2)], TASKS, plan=replace(PLAN, threads=1), steps=range(9))
    assert [len(next(steps)[0]) for _ in range(3)] == [2, 2, 2]
    with pytest.raises(StorageError, match="disk"):
        next(steps)
    assert not [t for t in threading.enumerate() if t.name.startswith("wsi-mmm-batch")]


def test_only_the_items_given_are_drawn() -> None:
    """A feed of some numbers never reads another item, and its classes are balanced among those."""
    source = picture_source("a", 30, targets=KNOWN)
    numbers = np.array([0, 3, 6, 7, 9, 12], np.int64)  # of class 0 but for 7
    found = some(source, 12, replace(PLAN, class_balance=True), numbers=numbers)
    keys = [key for batch in found for key in batch.keys]
    assert set(keys) == {f"a-{n}" for n in numbers}
    assert keys.count("a-7") == len(keys) // 2


def test_feeds_that_teach_nothing_are_refused() -> None:
    """A feed whose source has targets of no task of the model."""
    with pytest.raises(ConfigError, match="nothing that"):
        batches([DataFeed(picture_source("a", 3, targets={"other": 1}), 2)], TASKS, plan=PLAN, steps=range(1))


def test_augmentation_follows_the_batch() -> None:
    """The same batch is augmented the same way each time; another one differently; a model gets it normalised."""
    one, two = some(picture_source("a", 8, targets=KNOWN), 2)
    augment = Augment()
    assert torch.equal(pictures(one, augment), pictures(one, augment))
    assert not torch.equal(pictures(one, augment), pictures(one))
    assert not torch.equal(pictures(replace(one, seed=key_of("other")), augment), pictures(one, augment))

    class Model:
        device = torch.device("cpu")

        def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.permute(0, 3, 1, 2)

    look = make_preprocess(augment)
    assert torch.allclose(look(Model(), two), pictures(two, augment) * 255)  # type: ignore[arg-type]


def test_moving_a_batch_moves_all_of_it() -> None:
    """``to`` moves pixels, targets and bags; what the CPU decides by stays."""
    (batch,) = some(picture_source("a", 4, targets=KNOWN))
    there = batch.to("meta")
    assert {t.device.type for t in there.tensors()} == {"meta"} and len(there.tensors()) == 3
    assert there.theta is batch.theta and there.keys == batch.keys
    feed = DataFeed(picture_source("a", 4, targets=KNOWN), 4)
    (sent,) = next(batches([feed], TASKS, plan=PLAN, steps=range(1), device="meta"))
    assert sent.pixels is not None and sent.pixels.device.type == "meta"


def trained(folder: str, stop_at: int | None = None) -> tuple[torch.Tensor, list[float]]:
    """Weights of a tiny model after 24 steps of warped and augmented discs, and the losses on the way; with a
    ``folder`` they are kept there, and ``stop_at`` ends the first try."""
    model, tasks = tiny(("segment", "classify"), encoder="resnet18")
    own = {
        "t0": lambda s: (s.targets["discs"] > 0).astype(np.int32),
        "t1": lambda s: int((s.targets["discs"] == 1).sum() > 900),
    }
    source = picture_source("a", 24, size=96, targets=KNOWN)
    samples = tuple(replace(s, targets={name: find(s) for name, find in own.items()}) for s in source.samples)
    feed = DataFeed(replace(source, samples=samples, tasks=("t0", "t1")), 4)
    losses: list[float] = []

    def watch(progress: StepReport) -> None:
        losses.append(progress.losses["t0"])
        if progress.step == stop_at:
            raise KeyboardInterrupt

    plan = replace(PLAN, size=64)
    made = fitting.TrainingFeed(
        lambda first: batches([feed], tasks, plan=plan, steps=range(first, 24)), make_preprocess(Augment(noise=0.0))
    )
    how = FitPlan(24, seed=1, checkpoint_every=3, folder=folder, optim=OptimPlan(rate=5e-3))
    done = fit(model, tasks, made, plan=how, callbacks=TrainingListener(on_step=watch))
    return torch.cat([p.detach().flatten() for p in done.parameters()]), losses


def test_a_training_that_is_fed_so_learns_and_resumes(tmp_path: Path) -> None:
    """The loss of a segmentation falls; stopped after step 7 and begun again, weights are equal to the bit."""
    whole, losses = trained(str(tmp_path / "a"))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    with pytest.raises(KeyboardInterrupt):
        trained(str(tmp_path / "b"), stop_at=7)
    again, rest = trained(str(tmp_path / "b"))
    assert len(rest) == 24 - 6 and torch.equal(again, whole)


@dataclass
class CountedSource:
    """A source that counts its fetches, and how many are under way at once."""

    inner: SlideTiles
    now: int = 0
    most: int = 0
    fetched: list[list[int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    remote = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def fetch(self, numbers: Sequence[int], size: int) -> FetchedItems:
        with self.lock:
            self.fetched.append(list(numbers))
            self.now += 1
            self.most = max(self.most, self.now)
        found = self.inner.fetch(numbers, size)
        with self.lock:
            self.now -= 1
        return found

    def read(self, numbers: Sequence[int], size: int, fetched: FetchedItems | None = None) -> list[Sample]:
        assert fetched is not None
        return self.inner.read(numbers, size, fetched)


def slide_feed(uri: str) -> DataFeed:
    return DataFeed(slide_tiles("d", [SlideItem("s", uri, targets={"class": 1})], TileSampling(0.5, tile=64)), 3)


def test_far_slides_are_fetched_ahead_and_give_the_same_batches(tiny_slide: Path) -> None:
    """The bytes of coming draws are fetched side by side, of each draw once; no thread is left."""
    plan, steps = LoadPlan(64, seed=2, threads=2), range(10)
    near = list(batches([slide_feed(str(tiny_slide))], TASKS, plan=plan, steps=steps))
    with Faulty(files={"/s.tiff": tiny_slide}) as web:
        far = slide_feed(f"{web.url}/s.tiff")
        assert isinstance(far.source, SlideTiles) and far.source.remote
        source = CountedSource(far.source)
        web.delay = 0.03
        got = list(batches([DataFeed(source, 3)], TASKS, plan=plan, steps=steps))
        drawn = batches([DataFeed(source, 3)], TASKS, plan=plan, steps=range(100))
        next(drawn)
        drawn.close()  # type: ignore[attr-defined]
    assert all(same(x, y) for one, two in zip(near, got, strict=True) for x, y in zip(one, two, strict=True))
    assert source.most > 2 and len(source.fetched) <= 10 + 1 + 2 + READ_AHEAD + FETCHES
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("wsi-mmm-")]


def test_a_fetch_that_fails_fails_no_batch(tiny_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its items are then read by themselves."""
    plan, steps, failures = LoadPlan(64, threads=1), range(4), iter([True] * 3)
    near = list(batches([slide_feed(str(tiny_slide))], TASKS, plan=plan, steps=steps))
    whole = TiffReader.fetch

    def failing(reader: TiffReader, tiles: Sequence[Tiles]) -> Fetched:
        if threading.current_thread().name.startswith("wsi-mmm-fetch") and next(failures, False):
            raise StorageError("the cable was pulled")
        return whole(reader, tiles)

    with Faulty(files={"/s.tiff": tiny_slide}) as web:
        far = slide_feed(f"{web.url}/s.tiff")
        monkeypatch.setattr(TiffReader, "fetch", failing)
        got = list(batches([far], TASKS, plan=plan, steps=steps))
    assert next(failures, None) is None
    assert all(same(x, y) for one, two in zip(near, got, strict=True) for x, y in zip(one, two, strict=True))


# ---------------------------------------------------------------- the pictures of a step together


def test_what_a_task_knows_it_learns_from_all_the_same() -> None:
    """With norms that keep their statistics, the loss of each task and the gradient of a step are those of the
    micro-batches by themselves; bags, and micro-batches of which nothing was read, stay as they are."""
    model, tasks = tiny(["classify", "instances", "bag-classify"])
    model = model.double().eval()
    apart = (
        noise_batch(tasks, {"t0": "classify"}, seed=1, items=3, feed="a"),
        noise_batch(tasks, {"t1": "instances"}, seed=2, items=2, feed="b"),
        noise_batch(tasks, {"t2": "bag-classify"}, seed=3, feed="bags"),
        replace(noise_batch(tasks, {"t0": "classify"}, seed=4, items=1, feed="lost"), keys=(), failed=("x: why",)),
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
    one = (noise_batch(tasks, {"t0": "classify"}, seed=1),)
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
