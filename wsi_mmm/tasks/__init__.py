"""Tasks: `make_task` builds one from its card by kind. A new kind is a new file and one line in `_KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks.base import Task as Task
from wsi_mmm.tasks.base import View as View
from wsi_mmm.tasks.grouping import Rules
from wsi_mmm.tasks.instances import Instances
from wsi_mmm.tasks.segment import Segment
from wsi_mmm.tasks.tile_kinds import TILE_KINDS, allow
from wsi_mmm.types import TaskInfo

__all__ = ["Task", "View", "kinds", "make_task"]


def make_task(card: TaskCard) -> Task:
    """The task that ``card`` describes. ModelError if its kind or one of its parameters is unknown."""
    if card.kind not in kinds():
        raise ModelError(f"task '{card.name}' is of the unknown kind '{card.kind}'; known: {', '.join(kinds())}")
    info = TaskInfo(card.name, card.kind, card.classes, card.colors)
    try:
        if card.kind in TILE_KINDS:
            task = TILE_KINDS[card.kind](info, card.params, "bag" if card.head == "bag" else "tile")
        else:
            task = _KINDS[card.kind](info, card.params)
    except TypeError as error:
        raise ModelError(f"task '{card.name}' has a parameter that '{card.kind}' does not know: {error}") from error
    if card.head != _HEADS[task.scope]:
        raise ModelError(
            f"task '{card.name}' of kind '{card.kind}' needs a '{_HEADS[task.scope]}' head, not '{card.head}'"
        )
    if card.outputs != task.channels:
        raise ModelError(
            f"task '{card.name}' needs {task.channels} outputs for its classes, its card says {card.outputs}"
        )
    return task


def kinds() -> tuple[str, ...]:
    """Names of the registered kinds."""
    return tuple(sorted({**_KINDS, **TILE_KINDS}))


def _instances(info: TaskInfo, params: Mapping[str, float]) -> Task:
    if len(info.classes) != 1:
        raise ModelError(f"task '{info.name}': 'instances' takes exactly one class, not {len(info.classes)}")
    return Instances(info, Rules(**{name: int(value) for name, value in params.items()}))


def _segment(info: TaskInfo, params: Mapping[str, float]) -> Task:
    allow(params, ("background",))
    return Segment(info, len(info.classes), background=int(params.get("background", 0)))


_HEADS = {"pixel": "map", "tile": "vector", "bag": "bag"}
_KINDS: dict[str, Callable[[TaskInfo, Mapping[str, float]], Task]] = {
    "instances": _instances,
    "segment": _segment,
}
