"""From draws to batches on the device, made ahead by threads; the same batches whatever the number of threads.

draw -> `DataSource.read` -> crops' geometry -> warped targets -> `Task.target` -> `TrainBatch`, all on a thread; pixels
are cut to what the crops need and warped on the device (`pictures`). What could not be read is left out and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from wsi_mmm.errors import ConfigError
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.runner import start_one_core_threads
from wsi_mmm.tasks import Task
from wsi_mmm.tasks.targets import Target
from wsi_mmm.tiles.stream import Prefetcher, map_ahead
from wsi_mmm.training.augment import NO_AUGMENT, Augment, recolour
from wsi_mmm.training.data.base import DataSource, FetchedItems, Sample, SlideSource
from wsi_mmm.training.policy import Draw, FeedSize, Policy, key_of, of_rank, plan_step
from wsi_mmm.training.warp import (
    Change,
    cut,
    draw_thetas,
    padded,
    reach,
    unknown_target,
    warp_pixels,
    warp_target,
    widened,
)
from wsi_mmm.types import F32, I64, U8

MARGINS = {"instances": 32}
"""Kind of task -> px of target looked at round a crop: objects cut by its rim keep their true middle and depth."""

READ_AHEAD = 2
"""Micro-batches that may wait, ready, beyond those that the threads are making."""

FETCHES = 8
"""Micro-batches from slides far away whose bytes are fetched, or being fetched, beyond those that are being made."""

CHANGE = Change()


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """One micro-batch of one feed; n = ``len(keys)`` items (pictures, or bags), 0 when every one of them failed.

    Of pictures: ``pixels`` uint8[n, H, W, 3], padded with white; ``theta`` float32[n, 2, 3]: px of the crop of ``size``
    x ``size`` -> px of the picture (see `training.warp`; not applied yet: `pictures` does), always on the CPU. Of bags
    of m tiles: the same for each tile, and ``bag`` int64[m]: the item (0 to n - 1) that a tile belongs to, ascending.
    Of bags of features: ``vectors`` float32[m, D] and ``bag``.
    ``targets``: task -> `Task.target` of the n items, stacked, unknown where nothing is known of an item.
    ``failed``: "key: why" of items that were left out.
    """

    feed: str
    keys: tuple[str, ...]
    pixels: Tensor | None = None
    theta: Tensor | None = None
    vectors: Tensor | None = None
    bag: Tensor | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    size: int = 0
    failed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same on ``device``; from pinned memory the copy may still be under way on the current stream."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TrainBatch:
        """The same in memory that CUDA copies from while the model works."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def tensors(self) -> tuple[Tensor, ...]:
        """All that `to` moves."""
        found = (self.pixels, self.vectors, self.bag, *self.targets.values())
        return tuple(tensor for tensor in found if tensor is not None)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> TrainBatch:
        pixels, vectors, bag = (t if t is None else change(t) for t in (self.pixels, self.vectors, self.bag))
        targets = {name: change(target) for name, target in self.targets.items()}
        return replace(self, pixels=pixels, vectors=vectors, bag=bag, targets=targets)


@dataclass(frozen=True, eq=False)
class DataFeed:
    """A data set as training draws from it. ``numbers``: the items that may be drawn (None: all), ``batch`` of them
    make a micro-batch."""

    source: DataSource
    batch: int
    numbers: I64 | None = None
    weight: float = 1.0

    @cached_property
    def items(self) -> I64:
        """Numbers in the source of the items that may be drawn."""
        return np.arange(len(self.source.index), dtype=np.int64) if self.numbers is None else self.numbers

    def chosen(self, draw: Draw) -> list[int]:
        """Numbers in the source of the items of a draw."""
        found: list[int] = self.items[list(draw.numbers)].tolist()
        return found

    @cached_property
    def measure(self) -> FeedSize:
        """Sizes for planning; its items are numbered as `items` are."""
        labels = np.ascontiguousarray(self.source.index.labels[self.items])
        return FeedSize(self.source.name, len(self.items), self.batch, labels, self.weight)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How batches are made: crops of ``size`` px, drawn as `plan_step` says, changed as ``change`` allows; the share of
    ``rank``. ``threads`` make micro-batches ahead (0: none, each is made when it is asked for)."""

    size: int
    policy: Policy = "balanced"
    seed: int = 0
    rounds: int = 1
    temperature: float = 2.0
    class_balance: bool = False
    change: Change = CHANGE
    rank: int = 0
    world: int = 1
    threads: int = 2


def pictures(batch: TrainBatch, augment: Augment = NO_AUGMENT) -> Tensor:
    """The batch's crops as float32[n, 3, size, size] in [0, 1], channels_last, where its pixels are."""
    if batch.pixels is None or batch.theta is None:
        raise ValueError(f"a batch of '{batch.feed}' has no pixels")
    return recolour(warp_pixels(batch.pixels, batch.theta, batch.size), augment, seed=batch.seed)


def make_preprocess(augment: Augment = NO_AUGMENT) -> Callable[[MultiTaskModel, TrainBatch], Tensor]:
    """How a model looks at batches (see `training.forward`): warped, augmented and normalised on its device."""

    def look(model: MultiTaskModel, batch: TrainBatch) -> Tensor:
        there = batch if batch.pixels is None else replace(batch, pixels=batch.pixels.to(model.device))
        return model.prepare(pictures(there, augment).permute(0, 2, 3, 1) * 255.0)

    return look


# ---------------------------------------------------------------- the stream of steps


def batches(
    feeds: Sequence[DataFeed],
    tasks: Mapping[str, Task],
    *,
    plan: LoadPlan,
    steps: range,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[TrainBatch, ...]]:
    """For each of ``steps`` the micro-batches of this rank, on ``device``; maybe none.

    The same for the same (seed, step) whatever the threads. At most ``threads + READ_AHEAD`` micro-batches are held
    beyond those given out, and from far storage the bytes of FETCHES more. Errors of sources are raised here, in their
    turn. Closing the iterator cancels what has not begun and leaves no thread behind. Raises ConfigError.
    """
    by_name = {feed.source.name: feed for feed in feeds}
    learning = {name: tasks_of(feed, tasks) for name, feed in by_name.items()}
    sizes = [feed.measure for feed in feeds]
    sender = _Sender(torch.device(device))
    prefetch: Prefetcher[int, FetchedItems] = Prefetcher(FETCHES)  # by number of the draw

    def drawn(step: int) -> tuple[Draw, ...]:
        whole = plan_step(
            sizes, policy=plan.policy, seed=plan.seed, step=step,
            rounds=plan.rounds, temperature=plan.temperature, class_balance=plan.class_balance,
        )  # fmt: skip
        return of_rank(whole, plan.rank, plan.world)

    def numbered() -> Iterator[tuple[int, Draw]]:
        ahead = FETCHES if any(isinstance(feed.source, SlideSource) and feed.source.remote for feed in feeds) else 0
        coming: deque[tuple[int, Draw]] = deque()
        for number, draw in enumerate(draw for step in steps for draw in drawn(step)):
            source = by_name[draw.feed].source
            if isinstance(source, SlideSource) and source.remote:
                items, size = by_name[draw.feed].chosen(draw), _reading_size(plan, learning[draw.feed].values())
                prefetch.announce([number], partial(_fetch_items, source, items, size))
            coming.append((number, draw))
            if len(coming) > ahead:
                yield coming.popleft()
        yield from coming

    def make(numbered: tuple[int, Draw]) -> TrainBatch:
        number, draw = numbered
        fetched = prefetch.take(number)
        return sender.prepared(
            make_batch(by_name[draw.feed], learning[draw.feed], draw=draw, plan=plan, fetched=fetched)
        )

    def steps_made() -> Iterator[tuple[TrainBatch, ...]]:
        with ExitStack() as stack:
            stack.callback(prefetch.close)
            made: Iterator[TrainBatch] = map(make, numbered())
            if plan.threads > 0:  # one core each: the others belong to the model
                pool = start_one_core_threads(plan.threads, "wsi-mmm-batch")
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
                made = map_ahead(pool, make, numbered(), most=plan.threads + READ_AHEAD)
            for step in steps:
                yield sender.sent(tuple(next(made) for _ in drawn(step)))

    drawn(steps.start)  # a plan that cannot work is an error now
    return steps_made()


def _fetch_items(source: SlideSource, items: Sequence[int], size: int, _: object) -> FetchedItems:
    return source.fetch(items, size)


class _Sender:
    """To the device. On CUDA by a stream of its own, from pinned memory, while the model works; else as they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def prepared(self, batch: TrainBatch) -> TrainBatch:
        """On the thread that made it: pinned, and its copy begun."""
        if self._side is None:
            return batch
        with torch.cuda.stream(self._side):
            return batch.pinned().to(self.device)

    def sent(self, found: tuple[TrainBatch, ...]) -> tuple[TrainBatch, ...]:
        """On the model's thread: there, for its stream."""
        if self._side is None:
            return found if self.device.type == "cpu" else tuple(batch.to(self.device) for batch in found)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._side)
        for batch in found:
            for tensor in batch.tensors():
                tensor.record_stream(current)
        return found


# ---------------------------------------------------------------- one micro-batch


def tasks_of(feed: DataFeed, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that learn from ``feed``. Pictures can always be rebuilt. ConfigError when there are none."""
    learning = {
        name: task for name, task in tasks.items() if name in feed.source.tasks or task.info.kind == "reconstruct"
    }
    if not learning:
        raise ConfigError(
            f"feed '{feed.source.name}' knows of: {', '.join(sorted(feed.source.tasks)) or 'no task'}; "
            f"nothing that {', '.join(tasks)} can learn from: correct its tasks or leave it out"
        )
    return learning


def _reading_size(plan: LoadPlan, tasks: Iterable[Task]) -> int:
    """The side in px of the square that is read for a crop, with the margin that its warp and its targets need."""
    return reach(plan.change, plan.size, max((MARGINS.get(task.info.kind, 0) for task in tasks), default=0))


def make_batch(
    feed: DataFeed,
    tasks: Mapping[str, Task],
    *,
    draw: Draw,
    plan: LoadPlan,
    fetched: FetchedItems | None = None,
) -> TrainBatch:
    """The micro-batch of a draw for these tasks, on the CPU: a pure function of the draw and the source's files.

    ``fetched``: what `SlideSource.fetch` brought for it.
    """
    source, read = feed.source, _reading_size(plan, tasks.values())
    numbers = feed.chosen(draw)
    if isinstance(source, SlideSource):
        samples = source.read(numbers, read, fetched)
    else:
        samples = source.read(numbers, read)
    failed = tuple(f"{s.key}: {s.failed}" for s in samples if s.failed)
    batch = TrainBatch(feed.source.name, (), seed=draw.seed, size=plan.size, failed=failed)
    good, crops, cuts = [], [], []
    for place, sample in enumerate(samples):
        if not sample.failed:
            tiles = _sample_tiles(sample)
            # The warp of an item must not depend on which others failed: it goes by its place.
            thetas = draw_thetas(
                plan.change, [tile.shape[:2] for tile in tiles], size=plan.size, read=read,
                seed=key_of(f"{draw.seed}/{place}"),
            )  # fmt: skip
            good.append(sample)
            crops.append(thetas)
            cuts += [cut(tile, theta, plan.size) for tile, theta in zip(tiles, thetas, strict=True)]
    if not good:
        return batch
    vectors = [sample.vectors for sample in good if sample.vectors is not None]
    return replace(
        batch,
        keys=tuple(sample.key for sample in good),
        pixels=torch.from_numpy(padded([pixels for pixels, _ in cuts])) if cuts else None,
        theta=torch.from_numpy(np.stack([theta for _, theta in cuts])) if cuts else None,
        vectors=torch.from_numpy(np.concatenate(vectors).astype(np.float32, copy=False)) if vectors else None,
        bag=_bag_numbers(good),
        targets={
            name: torch.stack([_crop_target(task, s, thetas, plan.size) for s, thetas in zip(good, crops, strict=True)])
            for name, task in tasks.items()
        },
    )


def _sample_tiles(sample: Sample) -> Sequence[U8]:
    """The tiles of a bag, the one picture of others; none of features."""
    if sample.pixels is None:
        return ()
    return list(sample.pixels) if sample.pixels.ndim == 4 else [sample.pixels]


def _bag_numbers(samples: Sequence[Sample]) -> Tensor | None:
    counts = [count for sample in samples if (count := sample.bag_size) is not None]
    if not counts:
        return None
    if len(counts) < len(samples):
        raise ValueError("a micro-batch mixes bags and pictures: a source gives one or the other")
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def _crop_target(task: Task, sample: Sample, thetas: F32, size: int) -> Tensor:
    """The target of one item; made with the kind's margin, then cut to the crop."""
    kind, margin = task.info.kind, MARGINS.get(task.info.kind, 0)
    wide = size + 2 * margin
    known: Target = sample.targets.get(task.info.name)
    if known is None:
        known = unknown_target(kind, len(task.info.classes), wide)
    elif sample.bag_size is None:
        known = warp_target(kind, known, widened(thetas[0], margin), wide)
    rim = margin // task.stride
    target = task.target(known)
    return target[..., rim:-rim, rim:-rim] if rim else target


# ---------------------------------------------------------------- the pictures of a step together


def mixed(steps: Iterator[tuple[TrainBatch, ...]], tasks: Mapping[str, Task]) -> Iterator[tuple[TrainBatch, ...]]:
    """``steps``, each of them `together`."""
    with closing(steps):  # type: ignore[type-var]  # a generator, whose threads end with it
        for found in steps:
            yield together(found, tasks)


def together(found: Sequence[TrainBatch], tasks: Mapping[str, Task]) -> tuple[TrainBatch, ...]:
    """Micro-batches of pictures as one, and the others (bags; those of which nothing could be read) as they are.

    Where a micro-batch has no targets of a task, those of its items are unknown. A task's loss is then the mean over
    the items of the step with known targets, not over its micro-batches.
    """
    some = [batch for batch in found if len(batch) and batch.pixels is not None and batch.bag is None]
    if len(some) < 2:
        return tuple(found)
    names = [name for name in tasks if any(name in batch.targets for batch in some)]
    thetas = [batch.theta for batch in some if batch.theta is not None]
    whole = TrainBatch(
        "+".join(batch.feed for batch in some),
        tuple(key for batch in some for key in batch.keys),
        pixels=_one_size([batch.pixels for batch in some if batch.pixels is not None]),
        theta=torch.cat(thetas) if thetas else None,
        targets={name: torch.cat([_targets_or_unknown(batch, tasks[name]) for batch in some]) for name in names},
        seed=key_of("/".join(str(batch.seed) for batch in some)),
        size=some[0].size,
        failed=tuple(line for batch in some for line in batch.failed),
    )
    return (whole, *(batch for batch in found if all(batch is not one for one in some)))


def _one_size(pictures: Sequence[Tensor]) -> Tensor:
    """uint8[n, H, W, 3] each -> one, with white beside the smaller ones."""
    height, width = (max(t.shape[axis] for t in pictures) for axis in (1, 2))
    edges = [(0, 0, 0, width - t.shape[2], 0, height - t.shape[1]) for t in pictures]
    return torch.cat([functional.pad(t, edge, value=255) for t, edge in zip(pictures, edges, strict=True)])


def _targets_or_unknown(batch: TrainBatch, task: Task) -> Tensor:
    """The targets of a task, unknown ones where the micro-batch has none."""
    info = task.info
    if info.name in batch.targets:
        return batch.targets[info.name]
    nothing = task.target(unknown_target(info.kind, len(info.classes), batch.size))
    like = next(iter(batch.targets.values()), nothing)
    return nothing.to(like.device).expand(len(batch), *nothing.shape)
