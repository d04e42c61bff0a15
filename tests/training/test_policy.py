"""The sampler: pure, fair, without repetition, and cheap anywhere."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_mmm.errors import ConfigError
from wsi_mmm.training import policy as policies
from wsi_mmm.training.policy import Draw, FeedSize, Policy, fraction_of, of_rank, plan_step

NAMES: tuple[Policy, ...] = ("balanced", "cyclic", "concat", "proportional", "temperature")
ONE = st.tuples(st.integers(1, 40), st.integers(1, 7), st.sampled_from([1.0, 1.0, 2.0]))
FEEDS = st.lists(ONE, min_size=1, max_size=4)


def feeds_of(drawn: list[tuple[int, int, float]]) -> list[FeedSize]:
    return [FeedSize(f"f{i}", n, b, weight=w) for i, (n, b, w) in enumerate(drawn)]


def plans(feeds: list[FeedSize], policy: Policy, steps: int, **more: int) -> list[Draw]:
    return [draw for step in range(steps) for draw in plan_step(feeds, policy=policy, seed=3, step=step, **more)]


@given(FEEDS, st.sampled_from(NAMES), st.integers(0, 2**40), st.integers(-9, 2**40), st.booleans())
def test_a_step_is_a_pure_function(
    drawn: list[tuple[int, int, float]], policy: Policy, step: int, seed: int, balance: bool
) -> None:
    """Equal arguments give equal draws, also when nothing is cached; numbers are items; seeds are all different."""
    feeds = [FeedSize(f.name, f.items, f.batch, np.arange(f.items, dtype=np.int32) % 3 - 1) for f in feeds_of(drawn)]
    one = plan_step(feeds, policy=policy, seed=seed, step=step, rounds=2, class_balance=balance)
    for cache in (policies._slot_block, policies._short, policies._long, policies._feed_slots):
        cache.cache_clear()
    fresh = [replace(feed) for feed in feeds]
    assert one == plan_step(fresh, policy=policy, seed=seed, step=step, rounds=2, class_balance=balance)
    sizes = {f.name: f for f in feeds}
    assert all(len(d.numbers) == sizes[d.feed].batch for d in one)
    assert all(0 <= number < sizes[d.feed].items for d in one for number in d.numbers)
    assert len({d.seed for d in one}) == len(one)


@settings(max_examples=25)
@given(FEEDS, st.sampled_from(NAMES))
def test_nothing_comes_twice_before_everything_has_come_once(
    drawn: list[tuple[int, int, float]], policy: Policy
) -> None:
    """What a feed has given, cut into its epochs, is a permutation of its items each time, and not the same one."""
    feeds = feeds_of(drawn)
    given_: dict[str, list[int]] = {f.name: [] for f in feeds}
    for draw in plans(feeds, policy, 40, rounds=2):
        given_[draw.feed] += draw.numbers
    for feed in feeds:
        numbers = given_[feed.name]
        epochs = [numbers[i : i + feed.items] for i in range(0, len(numbers) - feed.items + 1, feed.items)]
        assert all(sorted(epoch) == list(range(feed.items)) for epoch in epochs)
        if feed.items > 12 and len(epochs) > 1:
            assert epochs[0] != epochs[1]


@given(FEEDS, st.sampled_from(NAMES), st.integers(1, 5), st.integers(0, 1000))
def test_ranks_share_the_plan_exactly(
    drawn: list[tuple[int, int, float]], policy: Policy, world: int, step: int
) -> None:
    """Every micro-batch of the plan belongs to one rank, also when there are fewer of them than ranks."""
    plan = plan_step(feeds_of(drawn), policy=policy, seed=0, step=step, rounds=3)
    parts = [of_rank(plan, rank, world) for rank in range(world)]
    assert Counter(d.seed for part in parts for d in part) == Counter(d.seed for d in plan)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_small_plans_by_hand() -> None:
    """Balanced: every feed in each step, twice for weight 2, none for weight 0; cyclic: in turn."""
    feeds = [FeedSize("a", 5, 2), FeedSize("b", 9, 1, weight=2.0), FeedSize("c", 9, 1, weight=0.0)]
    assert [d.feed for d in plan_step(feeds, policy="balanced", seed=0, step=7)] == ["a", "b", "b"]
    assert [d.feed for d in plans(feeds, "cyclic", 6)] == ["a", "b", "b", "a", "b", "b"]
    halves = [FeedSize("a", 5, 2), FeedSize("b", 9, 1, weight=0.5)]
    assert [d.feed for d in plans(halves, "cyclic", 6)] == ["a", "b", "a", "a", "b", "a"]
    five = FeedSize("a", 5, 5)
    assert sorted(plan_step([five], policy="cyclic", seed=0, step=4)[0].numbers) == [0, 1, 2, 3, 4]
    three = FeedSize("a", 3, 6)
    assert sorted(plan_step([three], policy="cyclic", seed=0, step=1)[0].numbers) == [0, 0, 1, 1, 2, 2]


def test_an_epoch_of_concat_holds_every_item() -> None:
    """Of 30, 7 and 2 items in batches of 4: 8 + 2 + 1 slots, in which each item comes once or twice."""
    feeds = [FeedSize("a", 30, 4), FeedSize("b", 7, 4), FeedSize("c", 2, 4)]
    steps = 11
    draws = plans(feeds, "concat", steps)
    assert Counter(d.feed for d in draws) == {"a": 8, "b": 2, "c": 1}
    assert {n for d in draws if d.feed == "a" for n in d.numbers} == set(range(30))
    assert [d.feed for d in draws] != [d.feed for d in plans(feeds, "concat", 2 * steps)[steps:]]


@pytest.mark.parametrize(("policy", "share"), [("proportional", 0.9), ("temperature", 0.75)])
def test_shares_follow_sizes(policy: Policy, share: float) -> None:
    """900 to 100 items: nine of ten; by the square root three of four; a feed of almost nothing still comes."""
    feeds = [FeedSize("a", 900, 1), FeedSize("b", 100, 1)]
    found = Counter(d.feed for d in plans(feeds, policy, 4, rounds=policies.BLOCK))
    assert abs(found["a"] / found.total() - share) < 0.001
    first = Counter(d.feed for d in plans(feeds, policy, 1, rounds=200))
    assert abs(first["a"] / 200 - share) < 0.08  # mixed, not one feed after the other
    rare = [FeedSize("a", 10**7, 1), FeedSize("b", 1, 1)]
    assert "b" in {d.feed for d in plan_step(rare, policy="proportional", seed=0, step=0, rounds=policies.BLOCK)}


@settings(max_examples=25)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=50), st.integers(1, 9))
def test_balanced_classes_take_turns(labels: list[int], batch: int) -> None:
    """Every run of C positions has each class once, and each class gives all its items before one comes again."""
    feed = FeedSize("a", len(labels), batch, np.array(labels, np.int32))
    numbers = [n for d in plans([feed], "cyclic", 60, class_balance=True) for n in d.numbers]  # type: ignore[arg-type]
    classes = sorted(set(labels))
    for i in range(0, len(numbers) - len(classes) + 1, len(classes)):
        assert sorted(labels[n] for n in numbers[i : i + len(classes)]) == classes
    for one in classes:
        mine = [n for n in numbers if labels[n] == one]
        members = labels.count(one)
        assert all(len(set(mine[i : i + members])) == members for i in range(0, len(mine) - members + 1, members))


def test_a_late_step_costs_no_more_than_the_first() -> None:
    """Step 1e6 of a million items is planned in well under a second with nothing cached."""
    feeds = [FeedSize("a", 10**6, 16), FeedSize("b", 300, 16)]
    for policy in NAMES:
        policies._slot_block.cache_clear()
        policies._long.cache_clear()
        begin = time.perf_counter()
        plan_step(feeds, policy=policy, seed=0, step=10**6, rounds=4)
        assert time.perf_counter() - begin < 1.0


@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=200), st.floats(0.001, 1.0), st.floats(0.001, 1.0),
    st.integers(0, 99),
)  # fmt: skip
def test_fractions_are_nested_and_miss_no_class(labels: list[int], a: float, b: float, seed: int) -> None:
    """The asked-for number of items, smaller within larger, each class in it while there is room for all."""
    array = np.array(labels, np.int32)
    less, more = (set(fraction_of(array, f, seed=seed).tolist()) for f in sorted((a, b)))
    assert less <= more
    assert len(less) == max(1, round(min(a, b) * len(labels)))
    classes = set(labels) - {-1}
    assert len({labels[i] for i in less} - {-1}) >= min(len(less), len(classes))


def test_what_cannot_be_planned_is_refused() -> None:
    """Unknown policies, empty feeds, two of one name, weights that leave nothing, ranks beyond the world."""
    feed = FeedSize("a", 3, 1)
    for feeds, policy in (
        ([feed], "random"),
        ([FeedSize("a", 0, 1)], "cyclic"),
        ([feed, feed], "cyclic"),
        ([FeedSize("a", 3, 1, weight=0.0)], "concat"),
        ([], "balanced"),
        ([feed, FeedSize("b", 3, 1, weight=0.001)], "balanced"),
    ):
        with pytest.raises(ConfigError):
            plan_step(feeds, policy=policy, seed=0, step=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        fraction_of(np.zeros(3, np.int32), 0.0, seed=0)
    with pytest.raises(ConfigError):
        of_rank((), 2, 2)
