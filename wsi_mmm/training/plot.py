"""The pictures that training draws: figures against the share of the data. matplotlib has its home here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_mmm.errors import MissingPackage
from wsi_mmm.storage.local import atomic_file

PNG, SVG = "fractions.png", "fractions.svg"
_COLOURS = ("#1f5fa8", "#c8641e", "#2f8a4c", "#7a4fa3", "#555555")
_APART = 0.06  # of the logarithm of a share, between curves of a panel: their bars would hide each other
_ITEMS = "% of the training items"


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of several curves. ``name`` of the figure; ``curves``: name -> percent -> the figure of each seed."""

    title: str
    name: str
    curves: Mapping[str, Mapping[float, Sequence[float]]]


def draw_curve(
    folder: Path, percents: Sequence[float], values: Sequence[Sequence[float]], *, name: str, title: str
) -> list[Path]:
    """Mean and spread (standard deviation) of ``values`` at ``percents``, each value a dot; PNG and SVG in ``folder``.

    MissingPackage without matplotlib; OutputError when the files cannot be written.
    """
    fig = _new_plot((5.0, 3.5))
    axes = fig.subplots()
    _draw_curve(axes, dict(zip(percents, values, strict=True)), _COLOURS[0])
    _label_fractions(axes, percents)
    axes.set(xlabel=_ITEMS, ylabel=name, title=title)
    return _save_plot(fig, [folder / PNG, folder / SVG])


def draw_panels(folder: Path, stem: str, panels: Sequence[Panel], *, columns: int) -> list[Path]:
    """``panels`` beside each other, ``columns`` in a row, those of a row on one scale; ``<stem>.png`` and ``.svg``.

    As `draw_curve`, with a legend in the first one.
    """
    rows = -(-len(panels) // columns)
    fig = _new_plot((4.2 * columns, 3.2 * rows))
    grid = fig.subplots(rows, columns, squeeze=False, sharey="row")
    for panel, axes in zip(panels, grid.flat, strict=False):
        middle = (len(panel.curves) - 1) / 2
        for number, (name, curve) in enumerate(panel.curves.items()):
            _draw_curve(axes, curve, _COLOURS[number % len(_COLOURS)], label=name, shift=1 + _APART * (number - middle))
        _label_fractions(axes, sorted({percent for curve in panel.curves.values() for percent in curve}))
        axes.set(xlabel=_ITEMS, ylabel=panel.name, title=panel.title)
    grid.flat[0].legend(frameon=False)
    return _save_plot(fig, [folder / f"{stem}.png", folder / f"{stem}.svg"])


def _new_plot(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, nothing global
    except ImportError as error:
        raise MissingPackage("no plot: it needs matplotlib, pip install 'wsi-mmm[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def _draw_curve(
    axes: Any, curve: Mapping[float, Sequence[float]], colour: str, *, label: str | None = None, shift: float = 1.0
) -> None:
    import numpy as np

    places = [percent * shift for percent in curve]
    means = [float(np.mean(some)) for some in curve.values()]
    spread = [float(np.std(some, ddof=1)) if len(some) > 1 else 0.0 for some in curve.values()]
    axes.errorbar(places, means, yerr=spread, marker="o", capsize=4, color=colour, label=label)
    dots = colour if label else "#888888"
    for place, some in zip(places, curve.values(), strict=True):
        axes.plot([place] * len(some), list(some), ".", color=dots, alpha=0.5 if label else 1.0, zorder=0)


def _label_fractions(axes: Any, percents: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(list(percents), [f"{percent:g}" for percent in percents])
    axes.minorticks_off()


def _save_plot(fig: Any, paths: Sequence[Path]) -> list[Path]:
    for path in paths:
        with atomic_file(path) as temporary:
            fig.savefig(temporary, dpi=150)
    return list(paths)
