"""The kinds that answer per pixel, made from the parameters of a card; see `make_task`.

============  ====  ============================================================================================
kind          head  parameters (numbers; ``<class>``: a class of the card)
============  ====  ============================================================================================
segment       map   ``background`` (0; -1: none) class that is not drawn, ``smoothing`` (0.02), ``weight:<class>`` (1)
multisegment  map   ``threshold`` (128) byte from which px are drawn, ``weight:<class>`` (1)
instances     map   those of `grouping.Rules`
detect        dense ``threshold`` (90) byte of a centre, ``overlap`` (0.4), ``size`` (16) usual side in target px
reconstruct   image ``patch`` (16) side of hidden squares in px, ``share`` (0.5) of them (0: grey instead),
                    ``centre`` (0.7) and ``spread`` (0.2) of the px drawn
============  ====  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wsi_mmm.errors import ModelError
from wsi_mmm.tasks.base import Task
from wsi_mmm.tasks.detect import Detect
from wsi_mmm.tasks.grouping import Rules
from wsi_mmm.tasks.instances import Instances
from wsi_mmm.tasks.multisegment import Multisegment
from wsi_mmm.tasks.reconstruct import Reconstruct
from wsi_mmm.tasks.segment import Segment
from wsi_mmm.tasks.tile_kinds import allow, each_class, weights_of
from wsi_mmm.types import TaskInfo

Params = Mapping[str, float]


def _instances(info: TaskInfo, params: Params) -> Task:
    if len(info.classes) != 1:
        raise ModelError(f"task '{info.name}': 'instances' takes exactly one class, not {len(info.classes)}")
    return Instances(info, Rules(**{name: int(value) for name, value in params.items()}))


def _segment(info: TaskInfo, params: Params) -> Task:
    allow(params, ("background", "smoothing", *each_class("weight", info)))
    return Segment(
        info, len(info.classes), background=int(params.get("background", 0)),
        smoothing=_within(info, params, "smoothing", 0.02, (0.0, 0.99)), weights=weights_of(info, params),
    )  # fmt: skip


def _multisegment(info: TaskInfo, params: Params) -> Task:
    allow(params, ("threshold", *each_class("weight", info)))
    threshold = int(_within(info, params, "threshold", 128, (1, 255)))
    return Multisegment(info, len(info.classes), threshold, weights_of(info, params))


def _detect(info: TaskInfo, params: Params) -> Task:
    allow(params, ("threshold", "overlap", "size"))
    return Detect(
        info, len(info.classes) + 4, int(_within(info, params, "threshold", 90, (1, 255))),
        overlap=_within(info, params, "overlap", 0.4, (0.05, 1.0)),
        size=_within(info, params, "size", 16.0, (1.0, 1000.0)),
    )  # fmt: skip


def _reconstruct(info: TaskInfo, params: Params) -> Task:
    allow(params, ("patch", "share", "centre", "spread"))
    return Reconstruct(
        info, int(_within(info, params, "patch", 16, (1, 4096))), _within(info, params, "share", 0.5, (0.0, 1.0)),
        centre=_within(info, params, "centre", 0.7, (0.0, 1.0)),
        spread=_within(info, params, "spread", 0.2, (1e-3, 10.0)),
    )  # fmt: skip


def _within(info: TaskInfo, params: Params, name: str, default: float, span: tuple[float, float]) -> float:
    found = float(params.get(name, default))
    if not span[0] <= found <= span[1]:
        raise ModelError(f"task '{info.name}': '{name}' is {found:g}: give a number from {span[0]:g} to {span[1]:g}")
    return found


PIXEL_KINDS: dict[str, tuple[str, Callable[[TaskInfo, Params], Task]]] = {
    "detect": ("dense", _detect),
    "instances": ("map", _instances),
    "multisegment": ("map", _multisegment),
    "reconstruct": ("image", _reconstruct),
    "segment": ("map", _segment),
}
"""Kind -> the head it wants, and how it is made."""
