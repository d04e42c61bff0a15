"""Tasks: `make_task` builds one from its card by kind. A new kind is a new file and one line in
`PIXEL_KINDS` or `TILE_KINDS`."""

from __future__ import annotations

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks.base import Task as Task
from wsi_mmm.tasks.base import View as View
from wsi_mmm.tasks.pixel_kinds import PIXEL_KINDS
from wsi_mmm.tasks.tile_kinds import TILE_KINDS
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
            task = PIXEL_KINDS[card.kind][1](info, card.params)
    except TypeError as error:
        raise ModelError(f"task '{card.name}' has a parameter that '{card.kind}' does not know: {error}") from error
    head = PIXEL_KINDS[card.kind][0] if task.scope == "pixel" else _HEADS[task.scope]
    if card.head != head:
        raise ModelError(f"task '{card.name}' of kind '{card.kind}' needs a '{head}' head, not '{card.head}'")
    if card.outputs != task.channels:
        raise ModelError(
            f"task '{card.name}' needs {task.channels} outputs for its classes, its card says {card.outputs}"
        )
    return task


def kinds() -> tuple[str, ...]:
    """Names of the registered kinds."""
    return tuple(sorted({*PIXEL_KINDS, *TILE_KINDS}))


_HEADS = {"tile": "vector", "bag": "bag"}
