"""Tasks: `make_task` builds one from its card. A new kind is a new class and one line in `TASK_KINDS`.

Their parameters and metrics are listed in `wsi_mmm.tasks.facts`, and shown in docs/training.md.
"""

from __future__ import annotations

from wsi_mmm.errors import ModelError, PluginError
from wsi_mmm.model.card import TaskCard
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.tasks.base import Task as Task
from wsi_mmm.tasks.detect import Detect
from wsi_mmm.tasks.instances import Instances
from wsi_mmm.tasks.reconstruct import Reconstruct
from wsi_mmm.tasks.segment import Multisegment, Segment
from wsi_mmm.tasks.tile_kinds import Classify, Multilabel, Regress, Survive
from wsi_mmm.tasks.window import View as View
from wsi_mmm.types import TaskInfo

__all__ = ["TASK_KINDS", "Task", "View", "find_kind", "make_task"]

TASK_KINDS: dict[str, type[Task]] = {
    "classify": Classify,
    "detect": Detect,
    "instances": Instances,
    "multilabel": Multilabel,
    "multisegment": Multisegment,
    "reconstruct": Reconstruct,
    "regress": Regress,
    "segment": Segment,
    "survive": Survive,
}

_MEMBERS = sorted(name for name in {*vars(Task), *Task.__annotations__} if not name.startswith("_"))


def find_kind(name: str) -> type[Task]:
    """Return the class of a kind of task, ours or a plug-in's. ModelError listing those there are, PluginError."""
    plugins = plugin_names("tasks")
    if name in TASK_KINDS:
        if name in plugins:
            raise PluginError(f"a plug-in offers a kind of task by the name '{name}', which is taken: give it another")
        return TASK_KINDS[name]
    if name not in plugins:
        known = ", ".join(sorted({*TASK_KINDS, *plugins}))
        raise ModelError(f"a task is of the unknown kind '{name}'; known: {known}; a plug-in must be installed here")
    kind = load_plugin("tasks", name)
    if not isinstance(kind, type) or not hasattr(kind, "from_params"):
        raise PluginError(f"the kind of task {name!r} of a plug-in is no class with the methods of wsi_mmm.tasks.Task")
    return kind


def make_task(card: TaskCard) -> Task:
    """The task that ``card`` describes. ModelError if its kind or one of its parameters is unknown."""
    kind = find_kind(card.kind)
    scope = next((scope for scope, head in kind.heads.items() if head == card.head), None)
    if scope is None:
        first, *others = (f"'{head}'" for head in kind.heads.values())
        needed = f"{first} head{' (or ' + ', '.join(others) + ')' if others else ''}"
        raise ModelError(f"task '{card.name}' of kind '{card.kind}' needs a {needed}, not '{card.head}'")
    try:
        task = kind.from_params(TaskInfo(card.name, card.kind, card.classes, card.colors, scope), card.params, scope)
    except TypeError as error:
        raise ModelError(f"task '{card.name}' has a parameter that '{card.kind}' does not know: {error}") from error
    missing = [name for name in _MEMBERS if not hasattr(task, name)]
    if missing:
        raise PluginError(f"task '{card.name}': the kind '{card.kind}' of a plug-in lacks {', '.join(missing)}")
    if card.outputs != task.channels:
        raise ModelError(
            f"task '{card.name}' needs {task.channels} outputs for its classes, its card says {card.outputs}"
        )
    return task
