"""The Source port: a data set as numbered items, read many at a time and never at random by itself.

A source is a pure function of its files: item ``i`` is the same on every rank and in every epoch. What is drawn and
how it is warped is decided elsewhere (`training.policy`, `training.warp`), so training can stop and go on at any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from wsi_mmm.slides.base import Fetched
from wsi_mmm.tasks.targets import Target
from wsi_mmm.types import F32, I32, I64, U8

FetchedItems = Mapping[int, Fetched | None]
"""What `SlideSource.fetch` brought, by an id of the source: None where fetching failed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An item as read. ``pixels`` uint8[h, w, 3] RGB; of a bag of tiles uint8[k, s, s, 3]; of a bag of features None
    and ``vectors`` float32[k, D]. ``xy`` int64[k, 2]: level-0 px of a bag's tiles. ``targets``: task name -> target in
    this sample's own px; a task that is absent knows nothing of it. ``failed``: why it could not be read ("" when it
    could): it is left out of the batch and counted, never trained on as white."""

    key: str
    pixels: U8 | None = None
    vectors: F32 | None = None
    xy: I64 | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    failed: str = ""


@dataclass(frozen=True, slots=True)
class ItemIndex:
    """Facts about n items that need no reading: ``keys`` (unique), ``groups`` (patient or slide: never divided
    between splits), ``labels`` int32[n] the class that balancing and stratifying go by (-1: none)."""

    keys: Sequence[str]
    groups: Sequence[str]
    labels: I32

    def __len__(self) -> int:
        return len(self.keys)


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
        """Names of the tasks that it can know something about."""

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
