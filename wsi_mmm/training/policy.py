"""The plan of a training step: a pure function of (seed, step), divided among ranks. It chooses, and reads nothing.

A *feed* is a data set as training sees it, a *micro-batch* some of its items, a *slot* one micro-batch in the order of
all. Every policy is a block of slots that repeats (a step, a round or an epoch) with fixed counts of each feed, in an
order drawn anew for every block. So how many micro-batches of a feed come before a slot is a product and a count
within one block, and step 1e6 costs what step 0 costs.

The k-th micro-batch of a feed takes its positions ``k * batch`` to ``(k + 1) * batch - 1``. Position p of n items is
item ``p % n`` of the permutation of epoch ``p // n``: nothing comes twice before everything has come once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

import numpy as np

from wsi_mmm.errors import ConfigError
from wsi_mmm.types import I32, I64

Policy = Literal["balanced", "cyclic", "concat", "proportional", "temperature"]
BLOCK = 1024
"""Slots of a block of `proportional` and `temperature`: shares are kept to one in so many, each feed at least once."""

UNEVEN = 64
"""How far weights may lie apart where a step or a round holds every feed as often as its weight says."""

_SMALL = 4096  # items: permutations up to this length are kept in hundreds, longer ones only while in use


@dataclass(frozen=True, eq=False)
class FeedSize:
    """The size of a feed, for planning: its unique ``name``, how many ``items`` it has, how many make a
    micro-batch, the class of each item (``labels`` int32[items], -1: none; for class balancing) and its ``weight``:
    against that of the others, how many times as often as with equal weights it comes (0: never)."""

    name: str
    items: int
    batch: int
    labels: I32 | None = None
    weight: float = 1.0

    @cached_property
    def by_class(self) -> tuple[I64, I64]:
        """Items sorted by class, and where each class begins (one more at the end). Items without one are a class."""
        values = np.zeros(self.items, np.int32) if self.labels is None else np.maximum(self.labels, -1)
        _, counts = np.unique(values, return_counts=True)
        return np.argsort(values, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


@dataclass(frozen=True, slots=True)
class Draw:
    """One micro-batch: items ``numbers`` of ``feed``; ``seed`` (63 bits) decides how they are warped and augmented."""

    feed: str
    numbers: tuple[int, ...]
    seed: int


def plan_step(
    feeds: Sequence[FeedSize],
    *,
    policy: Policy,
    seed: int,
    step: int,
    rounds: int = 1,
    temperature: float = 2.0,
    class_balance: bool = False,
) -> tuple[Draw, ...]:
    """All micro-batches of one optimiser step, the same on every rank.

    ``balanced``: each step has every feed once (those of larger weight than the least so many times, rounded),
    ``rounds`` times over. The others take the next ``rounds`` slots: ``cyclic`` of feeds in turn, ``concat`` of epochs
    in which every item comes once (the last micro-batch of a feed is filled up with its next ones), ``proportional``
    with feeds drawn by their size, ``temperature`` by size ** (1 / temperature) (Devlin et al. 2019; 1: proportional).
    ``class_balance``: within a feed its classes take turns, whatever their sizes. Raises ConfigError.
    """
    counts = _check_policy(feeds, policy, temperature, rounds)
    per_step = rounds * (sum(counts) if policy == "balanced" else 1)
    fixed = policy in ("balanced", "cyclic")
    draws = []
    for slot in range(step * per_step, (step + 1) * per_step):
        feed, number = _locate_slot(counts, slot, key=None if fixed else seed)
        draws.append(batch_at(feeds[feed], seed=seed, number=number, class_balance=class_balance))
    return tuple(draws)


def of_rank(draws: Sequence[Draw], rank: int, world: int) -> tuple[Draw, ...]:
    """The share of ``rank``: every ``world``-th micro-batch. Ranks may get unequal numbers, even none."""
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world}: ranks count from 0 to {world - 1}")
    return tuple(draws[rank::world])


def batch_at(feed: FeedSize, *, seed: int, number: int, class_balance: bool = False) -> Draw:
    """Micro-batch ``number`` of a feed, whatever the policy and the other feeds are."""
    positions = np.arange(number * feed.batch, (number + 1) * feed.batch)
    if class_balance and feed.labels is not None:
        items = _by_class(feed, seed=seed, positions=positions)
    else:
        items = _by_epoch(f"{seed}/{feed.name}", feed.items, positions)
    return Draw(feed.name, tuple(items.tolist()), key_of(f"{seed}/{feed.name}/draw/{number}"))


def fraction_of(labels: I32, fraction: float, *, seed: int) -> I64:
    """Numbers (ascending) of a ``fraction`` of items with ``labels`` int32[n]: for runs on less data.

    They are the first of an order in which one item of every class leads a permutation: larger fractions hold the
    smaller ones, and no class is missing while there are as many items as classes. At least one item.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"fraction of the data is {fraction}: give more than 0 and at most 1")
    ranking = np.random.default_rng(key_of(f"fraction/{seed}")).permutation(len(labels)).astype(np.int64)
    known = np.flatnonzero(labels[ranking] >= 0)
    leaders = known[np.unique(labels[ranking][known], return_index=True)[1]]
    ranking = np.concatenate([ranking[np.sort(leaders)], np.delete(ranking, leaders)])
    chosen: I64 = np.sort(ranking[: max(1, round(fraction * len(ranking)))])
    return chosen


def key_of(text: str) -> int:
    """63 bits of a hash: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


# ---------------------------------------------------------------- which feed


def _check_policy(feeds: Sequence[FeedSize], policy: Policy, temperature: float, rounds: int) -> tuple[int, ...]:
    """Slots of each feed in a block. ConfigError for what cannot be planned."""
    if policy not in get_args(Policy):
        raise ConfigError(f"there is no policy '{policy}'; known: {', '.join(get_args(Policy))}")
    if rounds < 1 or not temperature > 0:
        raise ConfigError(f"rounds {rounds} and temperature {temperature} must be above 0")
    for feed in feeds:
        if feed.items < 1 or feed.batch < 1 or not 0 <= feed.weight < float("inf"):
            raise ConfigError(
                f"feed '{feed.name}' has {feed.items} items, batch {feed.batch}, weight {feed.weight}: "
                "give it items, a batch of 1 or more and a weight of 0 or more, or leave it out"
            )
    if len({feed.name for feed in feeds}) < len(feeds) or not any(feed.weight > 0 for feed in feeds):
        raise ConfigError("feeds need names of their own, and one of them a weight above 0")
    counts = _feed_slots(tuple((f.items, f.batch, f.weight) for f in feeds), policy, temperature)
    if policy in ("balanced", "cyclic") and max(counts) > UNEVEN:
        raise ConfigError(f"weights of feeds differ {max(counts)}-fold: policy '{policy}' takes up to {UNEVEN}-fold")
    return counts


@lru_cache(maxsize=16)
def _feed_slots(feeds: tuple[tuple[int, int, float], ...], policy: Policy, temperature: float) -> tuple[int, ...]:
    """Of (items, batch, weight) of each feed: its slots in a block; at least one where the weight is above 0."""
    if policy in ("balanced", "cyclic"):
        least = min(weight for _, _, weight in feeds if weight > 0)
        wanted = [weight / least for _, _, weight in feeds]
    elif policy == "concat":
        wanted = [float(np.ceil(weight * items / batch)) for items, batch, weight in feeds]
    else:
        power = 1.0 / temperature if policy == "temperature" else 1.0
        shares = np.array([weight * items**power / batch for items, batch, weight in feeds])
        wanted = list(shares / shares.sum() * BLOCK)
    return tuple(max(1, round(w)) if weight > 0 else 0 for w, (_, _, weight) in zip(wanted, feeds, strict=True))


def _locate_slot(counts: tuple[int, ...], slot: int, *, key: int | None) -> tuple[int, int]:
    """The feed of a slot and how many micro-batches of it came before. ``key`` None: feeds in order, not shuffled."""
    block, place = divmod(slot, sum(counts))
    feeds, before = _slot_block(counts, None if key is None else (key, block))
    feed = int(feeds[place])
    return feed, block * counts[feed] + int(before[place])


@lru_cache(maxsize=8)
def _slot_block(counts: tuple[int, ...], key: tuple[int, int] | None) -> tuple[I32, I32]:
    """The feed of each slot of a block, and how many slots of that feed come before it within the block."""
    before = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    feeds = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    if key is None:
        ranking = np.argsort(before, kind="stable")  # in turn: 0 1 2 0 2, not 0 0 1 2 2
        return feeds[ranking], before[ranking]
    feeds = np.random.default_rng(key_of(f"block/{key}")).permutation(feeds)
    for number in range(len(counts)):
        mine = feeds == number
        before[mine] = np.arange(counts[number])
    return feeds, before


# ---------------------------------------------------------------- which items


def _by_epoch(name: str, items: int, positions: I64) -> I64:
    epochs, places = np.divmod(positions, items)
    out = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs).tolist():
        out[epochs == epoch] = _shuffled_items(f"{name}/epoch/{epoch}", items)[places[epochs == epoch]]
    return out


def _by_class(feed: FeedSize, *, seed: int, positions: I64) -> I64:
    """Every run of C positions has each of the C classes once; each class goes through its own epochs."""
    ranking, starts = feed.by_class
    classes = len(starts) - 1
    rounds, places = np.divmod(positions, classes)
    out = np.empty(len(positions), np.int64)
    for i, (turn, place) in enumerate(zip(rounds.tolist(), places.tolist(), strict=True)):
        one = int(_shuffled_items(f"{seed}/{feed.name}/turn/{turn}", classes)[place])
        first, last = int(starts[one]), int(starts[one + 1])
        out[i] = ranking[first + _by_epoch(f"{seed}/{feed.name}/class/{one}", last - first, np.array([turn]))[0]]
    return out


def _shuffled_items(name: str, items: int) -> I32:
    return _short(name, items) if items <= _SMALL else _long(name, items)


def _cached_permutation(name: str, items: int) -> I32:
    return np.random.default_rng(key_of(name)).permutation(items).astype(np.int32)


_short = lru_cache(maxsize=512)(_cached_permutation)
_long = lru_cache(maxsize=8)(_cached_permutation)
