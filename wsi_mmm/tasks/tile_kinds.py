"""The kinds that answer per tile or per bag, made from the parameters of a card; see `make_task`.

==========  ==============================================================================================
kind        parameters (numbers; ``<class>``: a class of the card)
==========  ==============================================================================================
classify    ``smoothing`` (0.02), ``weight:<class>`` (1)
multilabel  ``smoothing`` (0), ``weight:<class>`` (1) of what holds of a label
regress     ``centre`` (0), ``spread`` (1), ``centre:<class>``, ``spread:<class>``, ``huber`` (0)
survive     ``bins`` (0: Cox) intervals up to ``horizon``, or up to each of ``edge:1`` .. ``edge:<bins>``;
            ``efron`` (1; 0: Breslow) for ties of Cox
==========  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from wsi_mmm.errors import ModelError
from wsi_mmm.tasks.base import Scope, Task
from wsi_mmm.tasks.classify import Classify
from wsi_mmm.tasks.multilabel import Multilabel
from wsi_mmm.tasks.regress import Regress
from wsi_mmm.tasks.survive import Survive
from wsi_mmm.types import TaskInfo

Params = Mapping[str, float]


def allow(params: Params, known: Iterable[str]) -> None:
    """TypeError naming a parameter that is none of ``known``."""
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise TypeError(f"'{unknown[0]}'")


def _classify(info: TaskInfo, params: Params, scope: Scope) -> Task:
    smoothing, weights = _smoothing(info, params, 0.02), weights_of(info, params)
    return Classify(info, len(info.classes), scope, smoothing=smoothing, weights=weights)


def _multilabel(info: TaskInfo, params: Params, scope: Scope) -> Task:
    smoothing, weights = _smoothing(info, params, 0.0), weights_of(info, params)
    return Multilabel(info, len(info.classes), scope, smoothing=smoothing, weights=weights)


def _regress(info: TaskInfo, params: Params, scope: Scope) -> Task:
    allow(params, ("huber", "centre", "spread", *each_class("centre", info), *each_class("spread", info)))
    centre, spread = (_per_class(info, params, *default) for default in (("centre", 0.0), ("spread", 1.0)))
    if min(spread) <= 0:
        raise ModelError(f"task '{info.name}': 'spread' must be above 0, such as the standard deviation of the truths")
    return Regress(info, len(info.classes), centre, spread, scope, huber=bool(params.get("huber", 0)))


def _survive(info: TaskInfo, params: Params, scope: Scope) -> Task:
    if len(info.classes) != 1:
        raise ModelError(f"task '{info.name}': 'survive' takes exactly one class, the event, not {len(info.classes)}")
    bins = int(params.get("bins", 0))
    named = [f"edge:{i + 1}" for i in range(bins)]
    allow(params, ("bins", "horizon", "efron", *named))
    edges = tuple(float(params.get(name, params.get("horizon", 0.0) * (i + 1) / bins)) for i, name in enumerate(named))
    if any(b <= a for a, b in zip((0.0, *edges), edges, strict=False)):
        raise ModelError(f"task '{info.name}': give 'horizon' above 0, or rising 'edge:1' to 'edge:{bins}'")
    return Survive(info, edges, scope, efron=bool(params.get("efron", 1)))


def _smoothing(info: TaskInfo, params: Params, default: float) -> float:
    allow(params, ("smoothing", *each_class("weight", info)))
    found = float(params.get("smoothing", default))
    if not 0 <= found < 1:
        raise ModelError(f"task '{info.name}': 'smoothing' is {found:g}: give a share from 0 to below 1")
    return found


def weights_of(info: TaskInfo, params: Params) -> tuple[float, ...] | None:
    """Weights of the classes when the card has any."""
    if not set(params) & set(each_class("weight", info)):
        return None
    found = _per_class(info, params, "weight", 1.0)
    if min(found) < 0:
        raise ModelError(f"task '{info.name}': a weight is below 0")
    return found


def _per_class(info: TaskInfo, params: Params, name: str, default: float) -> tuple[float, ...]:
    common = params.get(name, default)
    return tuple(float(params.get(key, common)) for key in each_class(name, info))


def each_class(name: str, info: TaskInfo) -> list[str]:
    """Names of the parameters ``<name>:<class>``."""
    return [f"{name}:{one}" for one in info.classes]


TILE_KINDS: dict[str, Callable[[TaskInfo, Params, Scope], Task]] = {
    "classify": _classify,
    "multilabel": _multilabel,
    "regress": _regress,
    "survive": _survive,
}
