"""The one picture that training draws: a figure against the share of the data. matplotlib has its home here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wsi_mmm.errors import MissingPackage, OutputError

PNG, SVG = "fractions.png", "fractions.svg"


def draw_curve(
    folder: Path, percents: Sequence[float], values: Sequence[Sequence[float]], *, name: str, title: str
) -> list[Path]:
    """Mean and spread (standard deviation) of ``values`` at ``percents``, each value a dot; PNG and SVG in ``folder``.

    MissingPackage without matplotlib; OutputError when the files cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, nothing global
    except ImportError as error:
        raise MissingPackage("no plot: it needs matplotlib, pip install 'wsi-mmm[plot]'") from error
    import numpy as np

    means = [float(np.mean(some)) for some in values]
    spread = [float(np.std(some, ddof=1)) if len(some) > 1 else 0.0 for some in values]
    figure = Figure(figsize=(5.0, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(percents, means, yerr=spread, marker="o", capsize=4, color="#1f5fa8")
    for percent, some in zip(percents, values, strict=True):
        axes.plot([percent] * len(some), list(some), ".", color="#888888", zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(list(percents), [f"{percent:g}" for percent in percents])
    axes.minorticks_off()
    axes.set(xlabel="% of the training items", ylabel=name, title=title)
    paths = [folder / PNG, folder / SVG]
    try:
        for path in paths:
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write the plot into {folder}: {error.strerror or error}") from error
    return paths
