"""Plots of metrics against the share of the training data. matplotlib has its home here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_mmm.errors import MissingPackage
from wsi_mmm.storage.local import atomic_file

_COLOURS = ("#1f5fa8", "#c8641e", "#2f8a4c", "#7a4fa3", "#555555")
_APART = 0.06  # of the logarithm of a share, between curves of a panel: their bars would hide each other


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot of curves. ``name``: of the metric; ``curves``: name -> percent -> the metric of each seed."""

    title: str
    name: str
    curves: Mapping[str, Mapping[float, Sequence[float]]]


def draw_panels(folder: Path, stem: str, panels: Sequence[Panel], *, columns: int) -> list[Path]:
    """``panels`` beside each other, ``columns`` in a row, those of a row on one scale; ``<stem>.png`` and ``.svg``.

    Curves are the mean and the standard deviation of the seeds, each seed a dot; the first panel has a legend if there
    are several. MissingPackage without matplotlib; OutputError when the files cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, nothing global
    except ImportError as error:
        raise MissingPackage("no plot: it needs matplotlib, pip install 'wsi-mmm[plot]'") from error
    rows = -(-len(panels) // columns)
    fig: Any = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    grid = fig.subplots(rows, columns, squeeze=False, sharey="row")
    for panel, axes in zip(panels, grid.flat, strict=False):
        middle = (len(panel.curves) - 1) / 2
        for number, (name, curve) in enumerate(panel.curves.items()):
            _draw_curve(axes, curve, _COLOURS[number % len(_COLOURS)], label=name, shift=1 + _APART * (number - middle))
        percents = sorted({percent for curve in panel.curves.values() for percent in curve})
        axes.set_xscale("log")
        axes.set_xticks(percents, [f"{percent:g}" for percent in percents])
        axes.minorticks_off()
        axes.set(xlabel="% of the training items", ylabel=panel.name, title=panel.title)
    if len(panels[0].curves) > 1:
        grid.flat[0].legend(frameon=False)
    return _save_plot(fig, [folder / f"{stem}.png", folder / f"{stem}.svg"])


def _draw_curve(axes: Any, curve: Mapping[float, Sequence[float]], colour: str, *, label: str, shift: float) -> None:
    places = [percent * shift for percent in curve]
    means = [float(np.mean(some)) for some in curve.values()]
    spread = [float(np.std(some, ddof=1)) if len(some) > 1 else 0.0 for some in curve.values()]
    axes.errorbar(places, means, yerr=spread, marker="o", capsize=4, color=colour, label=label)
    for place, some in zip(places, curve.values(), strict=True):
        axes.plot([place] * len(some), list(some), ".", color=colour, alpha=0.5, zorder=0)


def _save_plot(fig: Any, paths: Sequence[Path]) -> list[Path]:
    for path in paths:
        with atomic_file(path) as temporary:
            fig.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
    return list(paths)
