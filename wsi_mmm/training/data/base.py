"""The DataSource port, a data set as numbered items, and the keys that every data set of a configuration has.

A source is a pure function of its files: item ``i`` is the same on every rank and in every epoch. Which items are drawn
and how they are warped is decided elsewhere (`training.policy`, `training.warp`), so training can resume at any step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from wsi_mmm.errors import ConfigError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.slides.base import Fetched
from wsi_mmm.tasks.targets import Target
from wsi_mmm.types import F32, I32, I64, U8

FetchedItems = Mapping[int, Fetched | None]
"""What `SlideSource.fetch` brought, by an id of the source: None where fetching failed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An item as read. ``pixels`` uint8[h, w, 3] RGB; of a bag of tiles uint8[k, s, s, 3]; of a bag of features None
    and ``vectors`` float32[k, D]. ``xy`` int64[k, 2]: level-0 px of a bag's tiles. ``targets``: task name -> target in
    this sample's own px; those of absent tasks are unknown. ``failed``: why it could not be read ("" when it
    could): it is left out of the batch and counted, never trained on as white."""

    key: str
    pixels: U8 | None = None
    vectors: F32 | None = None
    xy: I64 | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    failed: str = ""

    @property
    def bag_size(self) -> int | None:
        """The number of tiles of a bag; None of a picture."""
        if self.vectors is not None:
            return len(self.vectors)
        return len(self.pixels) if self.pixels is not None and self.pixels.ndim == 4 else None


@dataclass(frozen=True, slots=True)
class ItemIndex:
    """Facts about n items that need no reading: ``keys`` (unique), ``groups`` (patient or slide: never divided
    between splits), ``labels`` int32[n] the class that balancing and stratifying go by (-1: none)."""

    keys: Sequence[str]
    groups: Sequence[str]
    labels: I32

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, numbers: I64) -> ItemIndex:
        """The items ``numbers`` alone."""
        some = numbers.tolist()
        return ItemIndex([self.keys[n] for n in some], [self.groups[n] for n in some], self.labels[numbers])


class DataSource(Protocol):
    """One data set. Thread-safe; holds no open files that a fork could share."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""

    @property
    def index(self) -> ItemIndex:
        """Its items."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that it can have targets of."""

    def read(self, numbers: Sequence[int], size: int) -> list[Sample]:
        """These items, in this order. Sources that cut pictures out of slides or larger images give ``size`` px
        squares round the item (its place may lie nearer to the edge: then white, target unknown, beyond it); whole
        images are given whole. Raises StorageError or InputError only when going on is pointless."""


@runtime_checkable
class SlideSource(DataSource, Protocol):
    """A DataSource that reads tiles of slides, so that bytes can be fetched before they are decoded."""

    @property
    def remote(self) -> bool:
        """True if reading some of its slides waits for a network."""

    def fetch(self, numbers: Sequence[int], size: int) -> FetchedItems:
        """Fetch from slides far away what ``read`` of the same items needs, by an id of its own. What cannot be fetched
        is None: ``read`` tries again, and says why it fails."""

    def read(self, numbers: Sequence[int], size: int, fetched: FetchedItems | None = None) -> list[Sample]:
        """As a Source; bytes in ``fetched`` are not fetched again."""


# ---------------------------------------------------------------- as a configuration lists them


Expand = Callable[[Sequence[str]], Sequence[tuple[str, str, float | None, int | None]]]
"""Words for slides -> (id, URI, mpp override or None, scene or None) of each."""


def each_by_itself(words: Sequence[str]) -> list[tuple[str, str, float | None, int | None]]:
    """Every word is a slide, called by its file's stem."""
    return [(PurePosixPath(word).stem, word, None, None) for word in words]


@dataclass(frozen=True, slots=True)
class DataContext:
    """Facts of the training that opening a data set needs: its tasks, and the model's mpp and tile size."""

    tasks: Mapping[str, TaskCard]
    mpp: float
    size: int
    expand: Expand = each_by_itself


def first_groups(pattern: str, texts: Sequence[str], where: str) -> list[str | None]:
    """The text that the first group of a regular expression finds in each of ``texts``; None where it does not fit.

    ConfigError, which begins with ``where``: it is no regular expression with a group.
    """
    try:
        found = [re.search(pattern, text) for text in texts]
        return [None if match is None else str(match.group(1)) for match in found]
    except (re.error, IndexError) as error:
        raise ConfigError(f"{where} {pattern!r} is no pattern with one group in brackets ({error})") from error


class ConfigTable(BaseModel):
    """A table of a configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DatasetEntry(ConfigTable):
    """Keys that every data set has. ``batch``: items of a micro-batch; ``weight``: how often it comes (see
    sampling)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    batch: int = Field(default=8, ge=1)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
