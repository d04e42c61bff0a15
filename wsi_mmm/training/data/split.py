"""Splits into training, validation and test items, and a check that nothing is on two sides.

Groups (patients, slides) are never divided. Labels are spread as evenly as whole groups allow. The same seed and items
give the same split, whatever their order in the file.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_mmm.errors import ConfigError, InputError, ManifestError
from wsi_mmm.training.data.base import DataSource, ItemIndex, first_groups
from wsi_mmm.types import F64, I32, I64

PARTS = ("train", "val", "test")
_WORDS = {
    "train": "train", "training": "train", "learn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "tune": "val",
    "test": "test", "testing": "test", "holdout": "test", "": "",
}  # fmt: skip
_SHOWN = 5  # leaks that a report names of each kind
_AT_ONCE = 64  # items read together for their hashes


@dataclass(frozen=True)
class Split:
    """Numbers (ascending, int64) of the items of each part; together all items that are used."""

    train: I64
    val: I64
    test: I64

    def part(self, name: str) -> I64:
        """The part called train, val or test."""
        found: I64 = getattr(self, name)
        return found


def split_items(index: ItemIndex, *, shares: tuple[float, float, float] = (0.7, 0.15, 0.15), seed: int = 0) -> Split:
    """Items by whole groups into train, val and test of about these shares, stratified by label. ConfigError."""
    if min(shares) < 0 or not shares[0] > 0 or abs(sum(shares) - 1.0) > 1e-6:
        raise ConfigError(f"shares of train, val and test are {shares}: give three that add up to 1, train above 0")
    side = _assign_groups(index, np.array(shares), f"split/{seed}")
    return Split(*(np.flatnonzero(side == k) for k in range(3)))


def split_by_column(index: ItemIndex, column: Sequence[str]) -> Split:
    """As a table says: ``column`` has train, val or test (or a word like them) for each item; empty: not used.

    ManifestError for other words and for a group that the table divides.
    """
    words = [str(value).strip().lower() for value in column]
    wrong = sorted({word for word in words if word not in _WORDS})
    if wrong or len(words) != len(index):
        raise ManifestError(
            f"the split column has {len(words)} values for {len(index)} items"
            + (f" and says '{wrong[0]}'" if wrong else "")
            + ": give train, val, test or nothing for each item"
        )
    split = Split(*(np.flatnonzero([_WORDS[word] == name for word in words]) for name in PARTS))
    leaks = find_leaks({name: [(index, split.part(name))] for name in PARTS})
    divided = [leak for leak in leaks if leak.kind == "group"]
    if divided:
        raise ManifestError(f"the split column divides {divided[0]}: give all of its items one part")
    return split


def parts_by_pattern(index: ItemIndex, pattern: str, name: str) -> dict[str, str]:
    """Group -> train, val or test: the word that the first group of ``pattern`` finds in keys; groups of keys that it
    does not fit are left out. ConfigError: no pattern, another word, a group that is divided; ``name`` of the data."""
    parts: dict[str, str] = {}
    found = first_groups(pattern, index.keys, f"data '{name}': part")
    for group, word in zip(map(str, index.groups), found, strict=True):
        if word is None:
            continue
        word = word.lower()
        if not word or word not in _WORDS:
            raise ConfigError(f"data '{name}': part {pattern!r} finds '{word}', which is none of train, val and test")
        if parts.setdefault(group, _WORDS[word]) != _WORDS[word]:
            raise ConfigError(
                f"data '{name}': '{group}' is in '{parts[group]}' and in '{word}': move it to one of them"
            )
    return parts


def folds(index: ItemIndex, count: int, *, test: float = 0.0, seed: int = 0) -> tuple[Split, ...]:
    """``count`` splits: every item is in val once; first a share ``test`` of the items is put aside, the same for all.

    Grouped and stratified like `split_items`. ConfigError when there are fewer groups than folds.
    """
    if count < 2 or not 0.0 <= test < 1.0:
        raise ConfigError(f"{count} folds with a test share of {test}: give 2 folds or more and a share below 1")
    aside = _assign_groups(index, np.array([1.0 - test, test]), f"folds/{seed}/test") == 1
    rest = np.flatnonzero(~aside)
    inner = index.part(rest)
    side = _assign_groups(inner, np.full(count, 1.0 / count), f"folds/{seed}")
    if len(np.unique(side)) < count:
        raise ConfigError(f"{len(set(inner.groups))} groups do not fill {count} folds: use fewer folds")
    return tuple(Split(rest[side != k], rest[side == k], np.flatnonzero(aside)) for k in range(count))


def _assign_groups(index: ItemIndex, shares: F64, seed: str) -> I32:
    """int32[n]: the part of each item. Groups, large ones first, go where they leave labels nearest to their shares."""
    groups, member = np.unique(np.array([str(group) for group in index.groups], object), return_inverse=True)
    _, label = np.unique(np.maximum(index.labels, -1), return_inverse=True)
    table = np.zeros((len(groups), int(label.max(initial=0)) + 1))
    np.add.at(table, (member, label), 1.0)
    wanted = shares[:, None] * table.sum(0)
    scale = 1.0 / np.maximum(table.sum(0), 1.0)
    have = np.zeros_like(wanted)
    chosen = np.zeros(len(groups), np.int32)
    digests = [hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=6).digest() for group in groups.tolist()]
    tie = np.array([int.from_bytes(digest, "little") for digest in digests], np.float64)
    for number in np.lexsort((tie, -table.sum(1))).tolist():
        chosen[number] = _neediest_part(have, wanted, row=table[number], scale=scale, shares=shares)
        have[chosen[number]] += table[number]
    side: I32 = chosen[member] if len(groups) else np.zeros(0, np.int32)
    return side


def _neediest_part(have: F64, wanted: F64, *, row: F64, scale: F64, shares: F64) -> int:
    """The part that lacks most of the labels of this group, each counted in shares of all its items; of equal ones the
    part that lacks most items. Parts of share 0 get nothing."""
    short = ((wanted - have) * scale) @ (row > 0)
    missing = (wanted - have).sum(1)
    short, missing = np.where(shares > 0, short, -np.inf), np.where(shares > 0, missing, -np.inf)
    return int(np.lexsort((-missing, -np.round(short, 9)))[0])


def missing_labels(index: ItemIndex, split: Split) -> dict[str, tuple[int, ...]]:
    """Part -> the labels that occur somewhere but not in it; parts without items are left out."""
    everywhere = set(index.labels[index.labels >= 0].tolist())
    found = {}
    for name in PARTS:
        numbers = split.part(name)
        lacking = tuple(sorted(everywhere - set(index.labels[numbers].tolist())))
        if len(numbers) and lacking:
            found[name] = lacking
    return found


# ---------------------------------------------------------------- leaks


@dataclass(frozen=True, slots=True)
class Leak:
    """Something that is in two parts. ``kind``: group, key or picture; ``what``: its name, of a picture one key;
    ``where``: "part: key" of one item in each of the parts."""

    kind: str
    what: str
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} '{self.what}' ({'; '.join(self.where)})"


def find_leaks(
    parts: Mapping[str, Sequence[tuple[ItemIndex, I64]]], pictures: Mapping[str, str] | None = None
) -> tuple[Leak, ...]:
    """Find items that are on more than one side. ``parts``: name -> the items (index, numbers) of every source that are
    in it, so that two sources with one patient are found too; ``pictures``: key -> hash of its picture
    (`picture_hashes`)."""
    seen: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for part, members in parts.items():
        for index, numbers in members:
            for number in numbers.tolist():
                key = str(index.keys[number])
                seen["group", str(index.groups[number])].setdefault(part, key)
                seen["key", key].setdefault(part, key)
                if pictures and key in pictures:
                    seen["picture", pictures[key]].setdefault(part, key)
    found = []
    for (kind, name), where in seen.items():
        keys = list(where.values())
        if len(where) > 1 and not (kind == "picture" and len(set(keys)) == 1):  # one key in two parts: named as such
            named = tuple(f"{part}: {key}" for part, key in where.items())
            found.append(Leak(kind, keys[0] if kind == "picture" else name, named))
    return tuple(found)


def check_leaks(
    parts: Mapping[str, Sequence[tuple[ItemIndex, I64]]], pictures: Mapping[str, str] | None = None
) -> None:
    """InputError that counts and names the leaks, when there are any."""
    leaks = find_leaks(parts, pictures)
    if not leaks:
        return
    counts = ", ".join(
        f"{len(some)} {kind}{'s' if len(some) > 1 else ''}"
        for kind in ("group", "key", "picture")
        if (some := [leak for leak in leaks if leak.kind == kind])
    )
    named = ", ".join(map(str, leaks[:_SHOWN])) + (" ..." if len(leaks) > _SHOWN else "")
    raise InputError(f"{counts} in more than one part: {named}; put each on one side or remove the copies")


def picture_hashes(source: DataSource, numbers: I64, size: int) -> dict[str, str]:
    """Key -> hash of the decoded pixels of a picture of ``size`` px (whole images: of any size), of all tiles of a bag,
    or of its features: copies under another name have the same. Items that cannot be read are left out."""
    found = {}
    for first in range(0, len(numbers), _AT_ONCE):
        for sample in source.read(numbers[first : first + _AT_ONCE].tolist(), size):
            held = sample.pixels if sample.pixels is not None else sample.vectors
            if not sample.failed and held is not None:
                digest = hashlib.blake2b(repr(held.shape).encode(), digest_size=16)
                digest.update(np.ascontiguousarray(held).tobytes())
                found[sample.key] = digest.hexdigest()
    return found


def forbid_test(split: Split, numbers: I64) -> None:
    """ConfigError when ``numbers``, which training is about to draw from, hold an item of the test part."""
    touched = np.intersect1d(numbers, split.test)
    if len(touched):
        raise ConfigError(f"{len(touched)} items of the test part are among those to learn from: use the train part")
