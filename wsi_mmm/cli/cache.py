"""The commands about a cache: cache info, cache clean."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from wsi_mmm.cli.console import command, make_app, say, say_json, table

cache_app = make_app(
    "Look at a cache of runs, or make it smaller.\n\n\b\nExamples:\n  wsi-mmm cache info cache/\n"
    "  wsi-mmm cache clean cache/ --older-than 30"
)

Cache = Annotated[str, typer.Argument(metavar="CACHE", help="The folder that runs name with --cache.")]


@command(cache_app, "info")
def info(cache: Cache) -> None:
    """Show what a cache holds of each slide.

    \b
    Examples:
      wsi-mmm cache info cache/
      wsi-mmm cache info cache/ --json
    """
    from wsi_mmm.cache.inventory import inventory

    rows, shown = inventory(cache), []
    for row in rows:
        say_json(row)
        used = time.strftime("%Y-%m-%d", time.localtime(row.used))
        shown.append((row.slide, size(row.tiles), size(row.values), used))
    table(shown, ("slide (fingerprint)", "tiles", "features and maps", "last used"))
    say(f"{len(rows)} slides, {size(sum(row.tiles + row.values for row in rows))} in {cache}")


@command(cache_app, "clean")
def clean(
    cache: Cache,
    older_than: Annotated[
        float, typer.Option(min=0, help="Only what was not used for this many days.", metavar="DAYS")
    ] = 0.0,
    everything: Annotated[
        bool, typer.Option("--all", help="Features and maps too; not while a run works with the cache.")
    ] = False,
) -> None:
    """Remove cached tiles; the next run reads them from the slides again.

    \b
    Examples:
      wsi-mmm cache clean cache/
      wsi-mmm cache clean cache/ --older-than 30
      wsi-mmm cache clean cache/ --all
    """
    from wsi_mmm.cache.inventory import clean as remove

    freed = remove(cache, older_than=older_than, values=everything)
    say_json({"cache": cache, "freed": freed})
    say(f"freed {size(freed)} in {cache}")


def size(count: int) -> str:
    """Bytes in words: 12.3 GB."""
    value, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
