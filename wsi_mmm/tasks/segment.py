"""The kinds that draw regions: `segment`, one class per pixel, and `multisegment`, several independent masks, which may
lie on each other. Regions are cut at the core's rim here and dissolved later by `outputs.merge`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from wsi_mmm.outputs.polygons import Frame, concat, sort_by_anchor, to_objects, trace
from wsi_mmm.tasks.base import (
    AnyTarget,
    Params,
    Quantised,
    Scope,
    check_names,
    class_weights,
    has_no_table,
    head_of_scope,
    number_within,
)
from wsi_mmm.tasks.facts import parameter_names
from wsi_mmm.tasks.window import View, check_view
from wsi_mmm.types import I32, U8, Objects, TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

STRIDE = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """`segment`. ``channels`` is the number of classes; class ``background`` (-1: none) is not drawn.

    ``smoothing`` and ``weights``: see `pixel_classes_loss`.
    """

    info: TaskInfo
    channels: int
    background: int = 0
    smoothing: float = 0.02
    weights: tuple[float, ...] | None = None
    scope: Scope = "pixel"
    stride: int = STRIDE
    halo: int = 0

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "map"}
    head = head_of_scope
    table = has_no_table

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, parameter_names("segment", info.classes))
        return cls(
            info,
            len(info.classes),
            background=int(number_within(info, params, "background", 0, (-1, len(info.classes) - 1))),
            smoothing=number_within(info, params, "smoothing", 0.02, (0.0, 0.99)),
            weights=class_weights(info, params),
        )

    def target(self, value: AnyTarget) -> Tensor:
        """int32[h, w] class indices (negative: unknown) -> int64[h / 2, w / 2], the lower right px of each 2 x 2."""
        import torch

        labels = np.maximum(np.asarray(value, np.int64), -1)
        return torch.from_numpy(np.ascontiguousarray(labels[1::STRIDE, 1::STRIDE]))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in units of ln(classes), unknown px left out."""
        from wsi_mmm.tasks.losses_dense import pixel_classes_loss

        return pixel_classes_loss(logits, target, smoothing=self.smoothing, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Softmax per px as 0..255."""
        return (logits.float().softmax(1) * 255.0).round().byte()

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Mean intersection over union of the classes that occur, and pixel accuracy."""
        table = np.zeros((self.channels, self.channels), np.int64)
        for value, maps in pairs:
            wanted = self.target(value).numpy()
            known = wanted >= 0
            both = wanted[known] * self.channels + np.argmax(maps, axis=0)[known]
            table += np.bincount(both, minlength=table.size).reshape(table.shape)
        hit = np.diag(table)
        union = table.sum(0) + table.sum(1) - hit
        seen = union > 0
        return {
            "mean_iou": float((hit[seen] / union[seen]).mean()) if seen.any() else 1.0,
            "pixel_accuracy": float(hit.sum() / max(int(table.sum()), 1)),
        }

    def interpret(self, window: U8, view: View) -> Objects:
        """One object per connected region of a class in the core, exact corners; anchor: its first px.

        Nothing is drawn for the background and for px that no tile covers.
        """
        core = _core_part(window, view)
        labels = np.argmax(core, axis=0).astype(np.int32) + 1
        labels[(labels == self.background + 1) | ~core.any(axis=0)] = 0
        return _draw_regions(labels, view, self.info.name)


@dataclass(frozen=True, slots=True)
class Multisegment:
    """`multisegment`. ``channels`` is the number of classes; px of at least ``threshold`` (a byte) are drawn.

    ``weights``: see `masks_loss`.
    """

    info: TaskInfo
    channels: int
    threshold: int = 128
    weights: tuple[float, ...] | None = None
    scope: Scope = "pixel"
    stride: int = STRIDE
    halo: int = 0

    heads: ClassVar[Mapping[Scope, str]] = {"pixel": "map"}
    head = head_of_scope
    table = has_no_table

    @classmethod
    def from_params(cls, info: TaskInfo, params: Params, scope: Scope) -> Self:
        """The task of a card; see `wsi_mmm.tasks` for its parameters."""
        check_names(params, parameter_names("multisegment", info.classes))
        threshold = int(number_within(info, params, "threshold", 128, (1, 255)))
        return cls(info, len(info.classes), threshold, class_weights(info, params))

    def target(self, value: AnyTarget) -> Tensor:
        """int8[K, h, w] (1, 0, negative: unknown) -> int8[K, h / 2, w / 2], the lower right px of each 2 x 2."""
        import torch

        return torch.from_numpy(np.clip(np.asarray(value, np.int8)[:, 1::STRIDE, 1::STRIDE], -1, 1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy in units of ln 2, unknown px left out, every class counting alike."""
        from wsi_mmm.tasks.losses_dense import masks_loss

        return masks_loss(logits, target, weights=self.weights)

    def quantise(self, logits: Tensor) -> Tensor:
        """Probability of each class per px as 0..255."""
        return (logits.float().sigmoid() * 255.0).round().byte()

    def metrics(self, pairs: Iterable[tuple[AnyTarget, Quantised]]) -> dict[str, float]:
        """Mean over the classes that occur of intersection over union (mean_iou) and of Dice (mean_dice); 1 if none."""
        common, wanted, found = np.zeros((3, self.channels), np.int64)
        for value, maps in pairs:
            target = self.target(value).numpy()
            drawn = (maps >= self.threshold) & (target >= 0)
            common += (drawn & (target > 0)).sum((1, 2))
            wanted += (target > 0).sum((1, 2))
            found += drawn.sum((1, 2))
        seen = wanted + found > 0
        if not seen.any():
            return {"mean_iou": 1.0, "mean_dice": 1.0}
        both, either = common[seen], (wanted + found)[seen]
        return {"mean_iou": float((both / (either - both)).mean()), "mean_dice": float((2 * both / either).mean())}

    def interpret(self, window: U8, view: View) -> Objects:
        """One object per connected region of each class in the core, exact corners; anchor: its first px."""
        drawn = _core_part(window, view) >= self.threshold
        each = [_draw_regions(mask * np.int32(k + 1), view, self.info.name) for k, mask in enumerate(drawn)]
        return sort_by_anchor(concat(each))


def _core_part(window: U8, view: View) -> U8:
    """The map px of uint8[C, h, w] that lie in the core and on the slide."""
    check_view(window, view, STRIDE)
    y0, x0, y1, x1 = (v // STRIDE for v in view.core)
    top, left = view.y0 // STRIDE, view.x0 // STRIDE
    y1, x1 = min(y1, -(-view.height // STRIDE)), min(x1, -(-view.width // STRIDE))
    return window[:, max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)]


def _draw_regions(labels: I32, view: View, task: str) -> Objects:
    """One object per connected region of ``labels`` (class + 1 per map px of the core, 0: none), cut at the slide's
    edge; anchor: (y, x) target px of its first px, at whose top-left corner its exterior begins."""
    y, x = max(view.core[0], view.y0), max(view.core[1], view.x0)
    rings = trace(labels, "exact")
    first = rings.coords[rings.ring_offsets[rings.object_offsets[:-1]], ::-1].astype(np.int64)
    objects = to_objects(
        rings,
        Frame(x, y, STRIDE, view.scale_x, view.scale_y),
        task=task,
        class_index=rings.labels - 1,
        anchor=first * STRIDE + (y, x),
    )
    np.minimum(objects.coords, (view.width * view.scale_x, view.height * view.scale_y), out=objects.coords)
    return objects
