"""From draws to batches on the device: read ahead by threads, the same whatever their number.

draw -> `DataSource.read` -> crops' geometry -> warped targets -> `Task.target` -> `TrainBatch`, all on a thread; pixels
are cut to what the crops need and warped on the device (`pictures`). What could not be read is left out and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from wsi_mmm.errors import ConfigError
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.tasks import Task
from wsi_mmm.tasks.targets import Target
from wsi_mmm.tiles.stream import Prefetcher, map_ahead
from wsi_mmm.training.colour import NO_AUGMENT, Augment, recolour
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
_MAX_WARNINGS = 20  # reasons for failures that are kept


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """One micro-batch of one feed; n = ``len(keys)`` items (pictures, or bags), 0 when every one of them failed.

    Of pictures: ``pixels`` uint8[n, H, W, 3], padded with white; ``sizes`` int64[n, 2] (height, width) of each without
    padding; ``theta`` float32[n, 2, 3]: px of the crop of ``size`` x ``size`` -> px of the picture (see
    `training.warp`; not applied yet: `pictures` does). Of bags of m tiles: the same for each tile, and ``bag``
    int64[m]: the item (0 to n - 1) that a tile belongs to, ascending. Of bags of features: ``vectors`` float32[m, D]
    and ``bag``.
    ``targets``: task -> `Task.target` of the n items, stacked, unknown where nothing is known of an item.
    ``failed``: "key: why" of items that were left out. ``sizes`` and ``theta`` stay on the CPU.
    """

    feed: str
    keys: tuple[str, ...]
    pixels: Tensor | None = None
    theta: Tensor | None = None
    sizes: Tensor | None = None
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
    make a micro-batch; ``tasks``: those that learn from it (None: all that its source knows something about)."""

    source: DataSource
    batch: int
    numbers: I64 | None = None
    weight: float = 1.0
    tasks: tuple[str, ...] | None = None

    @cached_property
    def items(self) -> I64:
        """Numbers in the source of the items that may be drawn."""
        return np.arange(len(self.source.index), dtype=np.int64) if self.numbers is None else self.numbers

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


@dataclass
class Tally:
    """Counts of the items that were read: items learnt from, ``failed`` ones (the first reasons in ``reasons``),
    and micro-batches that were left ``empty`` by failures, which a step skips."""

    items: int = 0
    failed: int = 0
    empty: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, batch: TrainBatch) -> None:
        """Count one micro-batch."""
        self.items += len(batch)
        self.failed += len(batch.failed)
        self.empty += not len(batch)
        self.reasons += batch.failed[: max(0, _MAX_WARNINGS - len(self.reasons))]


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
    tally: Tally | None = None,
) -> Iterator[tuple[TrainBatch, ...]]:
    """For each of ``steps`` the micro-batches of this rank, on ``device``; maybe none.

    The same for the same (seed, step) whatever the threads. At most ``threads + READ_AHEAD`` micro-batches are held
    beyond those given out, and from far storage the bytes of FETCHES more. Errors of sources are raised here, in their
    turn. Closing the iterator cancels what has not begun and leaves no thread behind. Raises ConfigError.
    """
    by_name = {feed.source.name: feed for feed in feeds}
    names = {name: names_of(feed, tasks) for name, feed in by_name.items()}
    sizes = [feed.measure for feed in feeds]
    sender, counted = _Sender(torch.device(device)), tally or Tally()

    def drawn(step: int) -> tuple[Draw, ...]:
        whole = plan_step(
            sizes,
            policy=plan.policy,
            seed=plan.seed,
            step=step,
            rounds=plan.rounds,
            temperature=plan.temperature,
            class_balance=plan.class_balance,
        )
        return of_rank(whole, plan.rank, plan.world)

    prefetch: Prefetcher[int, FetchedItems] = Prefetcher(FETCHES)  # by number of the draw
    far = {feed.source.name for feed in feeds if isinstance(feed.source, SlideSource) and feed.source.remote}

    def announce(number: int, draw: Draw) -> None:
        source, items = by_name[draw.feed].source, by_name[draw.feed].items[list(draw.numbers)].tolist()
        if draw.feed in far and isinstance(source, SlideSource):
            size = _reading_size(plan, [tasks[name] for name in names[draw.feed]])
            prefetch.announce([number], lambda _: source.fetch(items, size))

    def numbered() -> Iterator[tuple[int, Draw]]:
        coming: deque[tuple[int, Draw]] = deque()
        for number, draw in enumerate(draw for step in steps for draw in drawn(step)):
            announce(number, draw)
            coming.append((number, draw))
            if len(coming) > (FETCHES if far else 0):
                yield coming.popleft()
        yield from coming

    def make(numbered: tuple[int, Draw]) -> TrainBatch:
        number, draw = numbered
        wanted, fetched = {name: tasks[name] for name in names[draw.feed]}, prefetch.take(number)
        return sender.prepared(make_batch(by_name[draw.feed], wanted, draw=draw, plan=plan, fetched=fetched))

    def steps_made() -> Iterator[tuple[TrainBatch, ...]]:
        with ExitStack() as stack:
            stack.callback(prefetch.close)
            made = _made_ahead(numbered(), make, threads=plan.threads, stack=stack)
            for step in steps:
                found = tuple(next(made) for _ in drawn(step))
                for batch in found:
                    counted.add(batch)
                yield sender.sent(found)

    drawn(steps.start)  # what cannot be planned is said now
    return steps_made()


def _made_ahead(
    draws: Iterator[tuple[int, Draw]],
    make: Callable[[tuple[int, Draw]], TrainBatch],
    *,
    threads: int,
    stack: ExitStack,
) -> Iterator[TrainBatch]:
    if threads < 1:
        yield from map(make, draws)
        return
    # A thread that makes batches computes alone: the others belong to the model. The setting is also that of threads
    # begun later, so it is set back.
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    pool = ThreadPoolExecutor(threads, "wsi-mmm-batch", initializer=torch.set_num_threads, initargs=(1,))
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    yield from map_ahead(pool, make, draws, most=threads + READ_AHEAD)


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


def names_of(feed: DataFeed, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The tasks that learn from ``feed``. Pictures can always be rebuilt. ConfigError when there are none."""
    known = {name for name, task in tasks.items() if task.info.kind == "reconstruct"} | set(feed.source.tasks)
    wanted = known & set(tasks) if feed.tasks is None else set(feed.tasks)
    wrong = sorted(wanted - (known & set(tasks)))
    if wrong or not wanted:
        raise ConfigError(
            f"feed '{feed.source.name}' knows of: {', '.join(sorted(feed.source.tasks)) or 'no task'}; "
            f"nothing that {', '.join(wrong or tasks)} can learn from: correct its tasks or leave it out"
        )
    return tuple(name for name in tasks if name in wanted)


def _reading_size(plan: LoadPlan, tasks: Iterable[Task]) -> int:
    """The side in px of what is read for a crop: with what its warp and its targets need round it."""
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
    numbers = feed.items[list(draw.numbers)].tolist()
    if isinstance(source, SlideSource):
        samples = source.read(numbers, read, fetched)
    else:
        samples = source.read(numbers, read)
    failed = tuple(f"{s.key}: {s.failed}" for s in samples if s.failed)
    good = [(place, sample) for place, sample in enumerate(samples) if not sample.failed]
    empty = TrainBatch(feed.source.name, (), seed=draw.seed, size=plan.size, failed=failed)
    if not good:
        return empty
    # The draw of an item must not depend on which others failed: it goes by its place.
    crops = [_draw_crops(plan, sample, read=read, seed=key_of(f"{draw.seed}/{place}")) for place, sample in good]
    kept = [sample for _, sample in good]
    pixels, theta, sizes = _stack_pixels(kept, crops, plan.size)
    return replace(
        empty,
        keys=tuple(sample.key for sample in kept),
        pixels=pixels,
        theta=theta,
        sizes=sizes,
        vectors=_stack_vectors(kept),
        bag=_bag_numbers(kept),
        targets={
            name: torch.stack([_crop_target(task, s, theta, plan.size) for s, theta in zip(kept, crops, strict=True)])
            for name, task in tasks.items()
        },
    )


def _draw_crops(plan: LoadPlan, sample: Sample, *, read: int, seed: int) -> F32:
    """float32[k, 2, 3]: the warps of a picture (k = 1), of a bag's tiles, of features (k = 0)."""
    shapes = [(tile.shape[0], tile.shape[1]) for tile in _sample_tiles(sample)]
    return draw_thetas(plan.change, shapes, size=plan.size, read=read, seed=seed)


def _sample_tiles(sample: Sample) -> Sequence[U8]:
    if sample.pixels is None:
        return ()
    return list(sample.pixels) if sample.pixels.ndim == 4 else [sample.pixels]


def _stack_pixels(
    samples: Sequence[Sample], crops: Sequence[F32], size: int
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """Pixels, theta and sizes of a `TrainBatch`."""
    pairs = [
        pair for s, thetas in zip(samples, crops, strict=True) for pair in zip(_sample_tiles(s), thetas, strict=True)
    ]
    if not pairs:
        return None, None, None
    parts = [cut(tile, theta, size) for tile, theta in pairs]
    pixels, sizes = padded([part for part, _ in parts])
    theta = np.stack([moved for _, moved in parts])
    return torch.from_numpy(pixels), torch.from_numpy(theta), torch.from_numpy(sizes)


def _stack_vectors(samples: Sequence[Sample]) -> Tensor | None:
    found = [sample.vectors for sample in samples if sample.vectors is not None]
    return torch.from_numpy(np.concatenate(found).astype(np.float32, copy=False)) if found else None


def _bag_numbers(samples: Sequence[Sample]) -> Tensor | None:
    counts = [_bag_size(sample) for sample in samples]
    known = [count for count in counts if count is not None]
    if not known:
        return None
    if len(known) < len(counts):
        raise ValueError("a micro-batch mixes bags and pictures: a source gives one or the other")
    return torch.from_numpy(np.repeat(np.arange(len(known)), known))


def _bag_size(sample: Sample) -> int | None:
    """Tiles of a bag; None of a picture."""
    if sample.vectors is not None:
        return len(sample.vectors)
    return len(sample.pixels) if sample.pixels is not None and sample.pixels.ndim == 4 else None


def _crop_target(task: Task, sample: Sample, thetas: F32, size: int) -> Tensor:
    """The target of one item; made with the kind's margin, then cut to the crop."""
    kind, margin = task.info.kind, MARGINS.get(task.info.kind, 0)
    wide = size + 2 * margin
    known: Target = sample.targets.get(task.info.name)
    if known is None:
        known = unknown_target(kind, len(task.info.classes), wide)
    elif _bag_size(sample) is None:
        known = warp_target(kind, known, widened(thetas[0], margin), wide)
    rim = margin // task.stride
    target = task.target(known)
    return target[..., rim:-rim, rim:-rim] if rim else target
