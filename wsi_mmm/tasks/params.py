"""Parameters of a task's card: named numbers, checked and given their defaults.

``<name>:<class>`` is the parameter of one class. An unknown name raises TypeError, which `make_task` explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wsi_mmm.errors import ModelError
from wsi_mmm.types import TaskInfo

Params = Mapping[str, float]


def check_names(params: Params, known: Iterable[str]) -> None:
    """TypeError naming the first parameter that is not in ``known``."""
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise TypeError(f"'{unknown[0]}'")


def number_within(info: TaskInfo, params: Params, name: str, default: float, span: tuple[float, float]) -> float:
    """The parameter ``name``; ModelError if it lies outside ``span``, both ends allowed."""
    value = float(params.get(name, default))
    if not span[0] <= value <= span[1]:
        raise ModelError(f"task '{info.name}': '{name}' is {value:g}: give a number from {span[0]:g} to {span[1]:g}")
    return value


def smoothing_share(info: TaskInfo, params: Params, default: float) -> float:
    """``smoothing`` of a task whose other parameters are weights of classes; ModelError if it is not in [0, 1)."""
    check_names(params, ("smoothing", *class_names("weight", info)))
    value = float(params.get("smoothing", default))
    if not 0 <= value < 1:
        raise ModelError(f"task '{info.name}': 'smoothing' is {value:g}: give a share from 0 to below 1")
    return value


def class_weights(info: TaskInfo, params: Params) -> tuple[float, ...] | None:
    """``weight:<class>`` of every class (1 by default), None if the card has none. ModelError for one below 0."""
    if not set(params) & set(class_names("weight", info)):
        return None
    weights = per_class(info, params, "weight", 1.0)
    if min(weights) < 0:
        raise ModelError(f"task '{info.name}': a weight is below 0")
    return weights


def per_class(info: TaskInfo, params: Params, name: str, default: float) -> tuple[float, ...]:
    """``<name>:<class>`` of every class, else ``name``, else ``default``."""
    common = params.get(name, default)
    return tuple(float(params.get(key, common)) for key in class_names(name, info))


def class_names(name: str, info: TaskInfo) -> list[str]:
    """The names ``<name>:<class>``, in the order of the classes."""
    return [f"{name}:{one}" for one in info.classes]
