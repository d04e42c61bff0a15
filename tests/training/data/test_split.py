"""Splits: whole groups, even labels, the same for the same seed; leaks are found and named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.memory_source import picture_source
from wsi_mmm.errors import ConfigError, InputError, ManifestError
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.split import (
    PARTS,
    Split,
    check_leaks,
    find_leaks,
    folds,
    forbid_test,
    missing_labels,
    parts_by_pattern,
    picture_hashes,
    split_by_column,
    split_items,
)  # fmt: skip
from wsi_mmm.training.loader import DataFeed
from wsi_mmm.training.policy import plan_step

LABELS = np.zeros(4, np.int32)


def index_of(groups: list[int], labels: list[int]) -> ItemIndex:
    return ItemIndex([f"k{i}" for i in range(len(groups))], [f"p{g}" for g in groups], np.array(labels, np.int32))


ITEMS = st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 3)), min_size=1, max_size=80)


def whole(split: Split, index: ItemIndex) -> None:
    """Every item is in one part, and so is every group."""
    parts = [split.part(name) for name in PARTS]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(index)))
    groups = [{index.groups[i] for i in part.tolist()} for part in parts]
    assert sum(map(len, groups)) == len(set(index.groups))


@settings(max_examples=60)
@given(ITEMS, st.integers(0, 99), st.sampled_from([(0.7, 0.15, 0.15), (1.0, 0.0, 0.0), (0.5, 0.5, 0.0)]))
def test_groups_stay_whole(items: list[tuple[int, int]], seed: int, shares: tuple[float, float, float]) -> None:
    """Every group is in one part; parts of share 0 are empty; the same seed gives the same, in any order of items."""
    index = index_of([g for g, _ in items], [label for _, label in items])
    split = split_items(index, shares=shares, seed=seed)
    whole(split, index)
    assert all(not len(split.part(name)) for name, share in zip(PARTS, shares, strict=True) if share == 0)
    order = np.random.default_rng(seed).permutation(len(index)).tolist()
    again = split_items(
        ItemIndex([index.keys[i] for i in order], [index.groups[i] for i in order], index.labels[order]),
        shares=shares, seed=seed,
    )  # fmt: skip
    for name in PARTS:
        assert {index.keys[i] for i in split.part(name)} == {index.keys[order[i]] for i in again.part(name)}


def test_shares_and_labels_are_kept() -> None:
    """200 patients of 1 to 6 items of three labels: every part has its share of every label, to a twentieth of it."""
    rng = np.random.default_rng(0)
    groups = [g for g in range(200) for _ in range(int(rng.integers(1, 7)))]
    labels = [(0, 0, 0, 1, 1, 2)[g % 6] for g in groups]
    index = index_of(groups, labels)
    split = split_items(index, seed=1)
    for name, share in zip(PARTS, (0.7, 0.15, 0.15), strict=True):
        for label in range(3):
            found = (index.labels[split.part(name)] == label).sum() / labels.count(label)
            assert abs(found - share) < 0.05
    assert missing_labels(index, split) == {}
    other = split_items(index, seed=2)
    assert set(other.test.tolist()) != set(split.test.tolist())


def test_one_large_patient_does_not_fill_the_test_part() -> None:
    """Of two patients with 40 % of the items each, both go to train."""
    split = split_items(index_of([0] * 40 + [1] * 40 + list(range(2, 22)), [0] * 100), seed=0)
    assert len(split.train) == 80 and len(split.val) == len(split.test) == 10


@settings(max_examples=40)
@given(ITEMS, st.integers(2, 4), st.sampled_from([0.0, 0.25]))
def test_folds_take_turns(items: list[tuple[int, int]], count: int, test: float) -> None:
    """Each item outside the test part is in val once; the test part is the same in all folds and in no other part."""
    index = index_of([g for g, _ in items], [label for _, label in items])
    if len(set(index.groups)) <= 2 * count:
        return  # may be too few: see below
    splits = folds(index, count, test=test, seed=3)
    for split in splits:
        whole(split, index)
        assert split.test.tolist() == splits[0].test.tolist()
    turns = np.concatenate([split.val for split in splits]).tolist()
    assert sorted(turns + splits[0].test.tolist()) == list(range(len(index)))


def test_a_column_decides() -> None:
    """Words are taken in any case, empty means unused; other words, a wrong length and divided groups are refused."""
    index = index_of([0, 0, 1, 2, 3], [0] * 5)
    split = split_by_column(index, ["Train", "training", "VAL", "test", ""])
    assert [split.part(name).tolist() for name in PARTS] == [[0, 1], [2], [3]]
    with pytest.raises(ManifestError, match="'maybe'"):
        split_by_column(index, ["maybe"] * 5)
    with pytest.raises(ManifestError, match="3 values for 5"):
        split_by_column(index, ["train"] * 3)
    with pytest.raises(ManifestError, match="p0"):
        split_by_column(index, ["train", "val", "", "", ""])


def test_leaks_are_found_across_sources_and_named() -> None:
    """One patient in two sources, one key twice, a copy of a picture under another name; else silence."""
    one, two = index_of([0, 1], [0, 0]), ItemIndex(["k0", "x1"], ["p7", "p1"], np.zeros(2, np.int32))
    parts = {"train": [(one, np.array([0, 1]))], "test": [(two, np.array([0, 1]))]}
    leaks = find_leaks(parts, {"k1": "same", "x1": "same"})
    assert {(leak.kind, leak.what) for leak in leaks} == {("key", "k0"), ("group", "p1"), ("picture", "k1")}
    with pytest.raises(
        InputError, match=r"1 group, 1 key, 1 picture in more than one part: .*'k0' \(train: k0; test: k0\)"
    ):
        check_leaks(parts, {"k1": "same", "x1": "same"})
    check_leaks({"train": [(one, np.array([0]))], "test": [(one, np.array([1]))]}, {"k0": "a", "k1": "b"})


def test_copies_have_one_hash() -> None:
    """The same px under two names; items that fail have none."""
    source = picture_source("a", 3, broken=frozenset({"a-2"}))
    twin = picture_source("b", 3)
    mine, theirs = picture_hashes(source, np.arange(3), 96), picture_hashes(twin, np.arange(3), 96)
    assert set(mine) == {"a-0", "a-1"}
    assert mine["a-0"] == theirs["b-0"] != theirs["b-1"]


def test_training_never_draws_from_the_test_part() -> None:
    """A thousand draws of a feed of the train part hold none of it; a feed that would is refused."""
    source = picture_source("a", 40, targets={"class": None})
    split = split_items(source.index, seed=0)
    feed = DataFeed(source, 8, split.train)
    forbid_test(split, feed.items)
    for step in range(125):
        (draw,) = plan_step([feed.measure], policy="cyclic", seed=0, step=step, class_balance=step % 2 == 0)
        assert not set(feed.items[list(draw.numbers)].tolist()) & set(split.test.tolist())
    with pytest.raises(ConfigError, match="of the test part"):
        forbid_test(split, DataFeed(source, 8).items)


def test_a_label_that_a_part_lacks_is_named() -> None:
    """The single patient of label 2 is in train: val and test lack it."""
    index = index_of([*range(21)], [0, 1] * 10 + [2])
    split = split_items(index, seed=0)
    assert missing_labels(index, split) == {"val": (2,), "test": (2,)}


def test_what_makes_no_split_is_refused() -> None:
    """Shares that do not add up, one fold, more folds than groups."""
    index = index_of([0, 1, 2], [0, 0, 0])
    for shares in ((0.5, 0.5, 0.5), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)):
        with pytest.raises(ConfigError, match="add up"):
            split_items(index, shares=shares)
    with pytest.raises(ConfigError, match="2 folds"):
        folds(index, 1)
    with pytest.raises(ConfigError, match="fewer"):
        folds(index, 4)


def test_paths_say_who_is_on_which_side() -> None:
    """Words in a path decide for the group; what does not fit is left to be drawn; faults have names."""
    index = ItemIndex(
        ["Train/p0/1.png", "train/p0/2.png", "holdout/p1/3.png", "p2/4.png"], ["p0", "p0", "p1", "p2"], LABELS
    )
    assert parts_by_pattern(index, "^([A-Za-z]+)/", "d") == {"p0": "train", "p1": "test"}
    for pattern, text in (
        ("^(tr)", r"finds 'tr', which is none of train, val and test"),
        ("^train", "no pattern with one group"),
        ("(", "no pattern with one group"),
    ):
        with pytest.raises(ConfigError, match=text):
            parts_by_pattern(index, pattern, "d")
    divided = ItemIndex(["train/1.png", "val/2.png"], ["p0", "p0"], LABELS[:2])
    with pytest.raises(ConfigError, match="'p0' is in 'train' and in 'val': move it"):
        parts_by_pattern(divided, "^(train|val)/", "d")
