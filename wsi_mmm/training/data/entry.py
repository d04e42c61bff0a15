"""Keys that every data set of a configuration has, and the facts that opening one needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field

from wsi_mmm.model.card import TaskCard

Expand = Callable[[Sequence[str]], Sequence[tuple[str, str, float | None]]]
"""Words for slides -> (id, URI, mpp override or None) of each."""


def each_by_itself(words: Sequence[str]) -> list[tuple[str, str, float | None]]:
    """Every word is a slide, called by its file's stem."""
    return [(PurePosixPath(word).stem, word, None) for word in words]


@dataclass(frozen=True, slots=True)
class DataContext:
    """Facts of the training that opening a data set needs: its tasks, and the model's mpp and tile size."""

    tasks: Mapping[str, TaskCard]
    mpp: float
    size: int
    expand: Expand = each_by_itself


class ConfigTable(BaseModel):
    """A table of a configuration; what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DatasetEntry(ConfigTable):
    """Keys that every data set has. ``batch``: items of a micro-batch; ``weight``: how often it comes (see
    sampling)."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    batch: int = Field(default=8, ge=1)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
