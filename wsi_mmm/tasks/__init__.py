"""Tasks: `make_task` builds one from its card by kind. A new kind is a new file and one line in `_KINDS`."""

from __future__ import annotations

from collections.abc import Callable

from wsi_mmm.errors import ModelError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.tasks.base import Task as Task
from wsi_mmm.tasks.base import View as View
from wsi_mmm.tasks.classify import Classify
from wsi_mmm.tasks.grouping import Rules
from wsi_mmm.tasks.instances import Instances
from wsi_mmm.tasks.segment import Segment
from wsi_mmm.types import TaskInfo

__all__ = ["Task", "View", "kinds", "make_task"]


def make_task(card: TaskCard) -> Task:
    """The task that ``card`` describes. ModelError if its kind or one of its parameters is unknown."""
    build = _KINDS.get(card.kind)
    if build is None:
        raise ModelError(f"task '{card.name}' is of the unknown kind '{card.kind}'; known: {', '.join(kinds())}")
    try:
        task = build(TaskInfo(card.name, card.kind, card.classes, card.colors), card.params)
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
    return tuple(sorted(_KINDS))


def _instances(info: TaskInfo, params: dict[str, int]) -> Task:
    if len(info.classes) != 1:
        raise ModelError(f"task '{info.name}': 'instances' takes exactly one class, not {len(info.classes)}")
    return Instances(info, Rules(**params))


def _segment(info: TaskInfo, params: dict[str, int]) -> Task:
    _allow(params, "background")
    return Segment(info, len(info.classes), background=params.get("background", 0))


def _classify(info: TaskInfo, params: dict[str, int]) -> Task:
    _allow(params)
    return Classify(info, len(info.classes))


def _allow(params: dict[str, int], *known: str) -> None:
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise TypeError(f"'{unknown[0]}'")


_HEADS = {"pixel": "map", "tile": "vector"}
_KINDS: dict[str, Callable[[TaskInfo, dict[str, int]], Task]] = {
    "classify": _classify,
    "instances": _instances,
    "segment": _segment,
}
