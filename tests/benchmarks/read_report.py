"""What `make bench-read` prints and draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from read_peers import LIMIT, OURS

Row = dict[str, Any]
COLOURS = {OURS: "#1b6ca8", LIMIT: "#c9c9c9"}


def markdown(title: str, rows: list[Row]) -> str:
    """Rates, and ours over each at two threads."""
    mine = next((row.get("rate_2") for row in rows if row["name"] == OURS), None)
    lines = [f"\n### {title}\n", "| | 1 thread | 2 threads | ours / it | opening, ms | |", "|---|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = [f"{row[k]:,.0f}" if k in row else "" for k in ("rate_1", "rate_2")]
        ratio = f"{mine / row['rate_2']:.2f}" if mine and "rate_2" in row else ""
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {ratio} | {row.get('open_ms', '')} | {row['note']} |")
    return "\n".join(lines)


def draw(results: Mapping[str, list[Row]], titles: Mapping[str, str], path: str) -> None:
    """Bars of tiles per second at two threads, one group per scenario that was compared with peers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: rows for name, rows in results.items() if name in ("native", "double", "half")}
    sizes = [len([row for row in rows if "rate_2" in row]) for rows in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(8, 0.34 * sum(sizes) + 0.9 * len(shown)), squeeze=False,
        gridspec_kw={"height_ratios": sizes}, layout="constrained",
    )  # fmt: skip
    for (name, rows), axis in zip(shown.items(), axes[:, 0], strict=True):
        fit = sorted((row for row in rows if "rate_2" in row), key=lambda row: row["rate_2"])
        colours = [COLOURS.get(row["name"], "#8fb3cc") for row in fit]
        bars = axis.barh([row["name"] for row in fit], [row["rate_2"] for row in fit], color=colours)
        axis.bar_label(bars, [f"{row['rate_2']:,.0f}" for row in fit], padding=3, fontsize=8)
        axis.set_title(titles[name], loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("tiles per second, two threads", fontsize=8)
    figure.savefig(path, dpi=140)
