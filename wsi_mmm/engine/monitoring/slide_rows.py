"""Rows of slides beside their results: the cost of the run that made them, and the tables of all slides of a folder.

Several runs may write to one output at once, such as the jobs of an array. Each slide's folder is written by one of
them; the tables are derived from all folders, so that it does not matter which run writes them last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from wsi_mmm.errors import StorageError
from wsi_mmm.outputs.report import FACTS, SlideRow, row_json
from wsi_mmm.outputs.summary import SlideResults, summary_csv, summary_parquet
from wsi_mmm.outputs.tables import slides_csv, slides_parquet
from wsi_mmm.storage import store

ROW = "report.json"
"""The file, in the folder of a slide, with its row in the report of the run that made the results."""

READERS = 16  # slide.json files read at once: on storage every one is a request
TRIES = 5  # times that the tables are written while other runs publish slides

PUBLISHED = ("done", "partial", "empty")
"""Statuses of slides whose results lie in their folder."""

_COST = ("seconds", "tiles_per_s", "busy_share", "bytes_read", "cache_hits", "peak_rss_mb")
_COST_EXTRA = ("stages", "time", "features_s", "model_began_s", "device", "encoder", "tile_cache")


def keep_row(output: str, row: SlideRow, result_hash: str) -> None:
    """Write the row of a slide that this run has published beside its results. Raises OutputError."""
    data = json.dumps({"result_hash": result_hash, **row_json(row)}, indent=1).encode()
    store.write_bytes(store.join(output, row.id, ROW), data)


def with_kept_cost(row: SlideRow, kept: Mapping[str, Any] | None) -> SlideRow:
    """The row of a slide that was done before, with the cost of the run that did it (``kept``: what `keep_row` wrote).

    The cost of looking at it in this run becomes ``this_run``. Without a kept row nothing is known of the earlier run.
    """
    if kept is None or not all(_is_number(kept.get(name)) for name in _COST):
        return row
    this_run = {"seconds": row.seconds, "bytes_read": row.bytes_read, "peak_rss_mb": row.peak_rss_mb}
    this_run |= {name: row.extra[name] for name in ("stages", "time")}
    extra = {name: kept[name] for name in _COST_EXTRA if _is_like(kept.get(name), row.extra.get(name))}
    return replace(row, **{name: kept[name] for name in _COST}, extra={**row.extra, **extra, "this_run": this_run})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_like(value: object, own: object) -> bool:
    """Whether a value that was read may stand in the place of ``own`` in a report."""
    if isinstance(own, dict):
        return isinstance(value, dict) and all(_is_number(inner) for inner in value.values())
    if _is_number(own):
        return _is_number(value)
    return isinstance(value, list) if isinstance(own, list) else isinstance(value, str)


# ---------------------------------------------------------------- tables of all slides


def write_slide_tables(output: str, rows: Sequence[SlideRow], *, answers: bool = True) -> None:
    """Write summary.csv and summary.parquet, with ``answers`` also slides.csv and slides.parquet: ``rows`` of this run,
    then every other slide with results in ``output``.

    Each file is written whole. A run that publishes at the same time may be overwritten by what was read before, so
    the folders are read again afterwards: whoever writes last has seen all. Raises StorageError.
    """
    found = all_results(output, rows)
    for _ in range(TRIES):
        tables = {"summary.csv": summary_csv(found), "summary.parquet": summary_parquet(found)}
        if answers:
            of_slides = [one.row for one in found]
            tables |= {"slides.csv": slides_csv(of_slides), "slides.parquet": slides_parquet(of_slides)}
        for name, data in tables.items():
            store.write_bytes(store.join(output, name), data)
        again = all_results(output, rows)
        if again == found:
            return
        found = again


def all_rows(output: str, rows: Sequence[SlideRow]) -> list[SlideRow]:
    """``rows``, then those of all other slides whose results lie in ``output``, by id."""
    return [one.row for one in all_results(output, rows)]


def all_results(output: str, rows: Sequence[SlideRow]) -> list[SlideResults]:
    """The slides of ``rows``, then all others whose results lie in ``output``, by id: two small files read for each."""
    others = sorted(set(store.list_folders(output)) - {row.id for row in rows})
    with ThreadPoolExecutor(READERS, "wsi-mmm-rows") as threads:
        own = list(threads.map(lambda row: _results_of(output, row), rows))
        found = list(threads.map(lambda name: _published_results(output, name), others))
    return [*own, *(one for one in found if one is not None)]


def _results_of(output: str, row: SlideRow) -> SlideResults:
    """A slide of this run; one that failed may have results of an earlier run, which are not its own."""
    facts = _read_object(store.join(output, row.id, "slide.json")) if row.status in PUBLISHED else None
    return SlideResults(row, facts if facts is not None and facts.get("id") == row.id else {})


def _published_results(output: str, name: str) -> SlideResults | None:
    """The slide in folder ``name``, as far as its slide.json tells; None where there is no such slide."""
    facts = _read_object(store.join(output, name, "slide.json"))
    if facts is None or facts.get("id") != name:
        return None
    kept = _read_object(store.join(output, name, ROW)) or {}
    # Only partial slides have tiles that failed: slide.json does not count them.
    failed = kept.get("failed_tiles") if facts.get("status") == "partial" else 0
    seconds = kept.get("seconds") if kept.get("result_hash") == facts.get("result_hash") else None
    known = {"uri": str(facts.get("uri")), "status": str(facts.get("status")), "mpp_effective": None, "tiles": 0}
    known |= {name: facts[name] for name in ("mpp_effective", "tiles") if _is_number(facts.get(name))}
    blank: dict[str, Any] = dict.fromkeys(FACTS, 0) | {"id": name, "error": None, "mpp_requested": None, **known}
    blank |= {"failed_tiles": failed if _is_number(failed) else 0, "seconds": seconds if _is_number(seconds) else None}
    answers = facts.get("answers")
    return SlideResults(SlideRow(**blank, extra={"answers": answers} if isinstance(answers, dict) else {}), facts)


def _read_object(uri: str) -> dict[str, Any] | None:
    """A JSON object; None when it is missing, cannot be read or is none."""
    try:
        found = json.loads(store.read_bytes(uri))
    except (StorageError, ValueError):
        return None
    return found if isinstance(found, dict) else None
