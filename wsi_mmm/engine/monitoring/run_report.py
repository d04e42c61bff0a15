"""The run report: a row per slide as it ends, report.json and report.html at the end; and the texts about slides."""

from __future__ import annotations

import json
import platform
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from wsi_mmm._version import __version__
from wsi_mmm.engine.events import SlideStatus
from wsi_mmm.engine.monitoring.accounting import RunAccounting, SlideTotals, busy_share, round_seconds
from wsi_mmm.engine.monitoring.slide_rows import keep_row, with_kept_cost, write_slide_tables
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import SlideState, enlarged_text
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import OptionError, OutputError, StorageError
from wsi_mmm.outputs import exports, slide_vectors
from wsi_mmm.outputs.report import FACTS, SlideRow, report_html, report_json
from wsi_mmm.storage import store

_PACKAGES = ("torch", "timm", "openslide-python", "openslide-bin", "zarr", "dask", "shapely", "numpy")


@dataclass(slots=True)
class RunReport:
    """The report of a run. ``slides``: one SlideRow each, in the order asked for.

    ``exit_code``: 0 every slide succeeded, 3 some failed or have tiles that could not be read, 4 none succeeded.
    ``unsaved``: why report.json and report.html could not be written; then a code of 0 is 3, too.
    ``warnings``: what was said when it began. ``accounting``: where the time went, from the units and results that it
    is shown.
    """

    output: str
    recipe: Recipe
    names: tuple[str, ...]
    rows: dict[str, SlideRow] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    device: str = ""
    unsaved: str = ""
    warnings: list[str] = field(default_factory=list)
    accounting: RunAccounting = field(default_factory=RunAccounting)

    @property
    def slides(self) -> list[SlideRow]:
        """Rows of the slides that have ended."""
        return [self.rows[name] for name in self.names if name in self.rows]

    @property
    def path(self) -> str:
        """URI of report.html."""
        return store.join(self.output, "report.html")

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ran this; slides that never ended count as failed."""
        missing = ["failed"] * (len(self.names) - len(self.slides))
        return exit_code([*(row.status for row in self.slides), *missing], saved=not self.unsaved)

    def add(self, state: SlideState) -> SlideRow:
        """Add the row of a slide that has ended."""
        totals = self.accounting.close_slide(state.task.id, state.started, state.ended)
        row = make_row(state, totals)
        if state.resumed:
            row = with_kept_cost(row, state.summary.cost if state.summary else None)
        elif state.plan is not None and state.status is not SlideStatus.FAILED:
            with suppress(StorageError):  # a full disk shows when the report is written
                keep_row(self.output, row, state.plan.slide.result_hash())
        self.rows[state.task.id] = row
        return row

    def save(self) -> None:
        """Write report.json and report.html, whole; the slides' results stand even when that fails (``unsaved``)."""
        try:
            self._write_files()
        except StorageError as error:
            self.unsaved = str(error)

    def _write_files(self) -> None:
        self.seconds = time.time() - self.started
        facts = {
            "wsi_mmm_version": __version__, "versions": versions(), "recipe": self.recipe.to_json(),
            "recipe_hash": self.recipe.result_hash(),
            "argv": [store.redact(word) for word in sys.argv],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(self.seconds, 3),
            "device": self._device_names(), "warnings": self.warnings,
            "slides_asked": len(self.names), "workers": self.accounting.worker_rows(),
        }  # fmt: skip
        store.write_bytes(store.join(self.output, "report.json"), report_json(facts, self.slides))
        if self.recipe.tasks:
            answers = any("answers" in row.extra for row in self.slides)
            write_slide_tables(self.output, self.slides, answers=answers)
        store.write_bytes(self.path, report_html(facts, self.slides, self._read_overlays()))

    def _device_names(self) -> str:
        """What the model ran on; what was asked for when it ran nowhere (all slides resumed, failed or empty)."""
        ran = (row for row in self.rows.values() if row.extra.get("device") and not row.extra.get("resumed"))
        used = {str(row.extra["device"]) for row in ran}
        return ", ".join(sorted(used)) or self.recipe.options.device

    def _read_overlays(self) -> dict[str, bytes]:
        """The pictures of at most 200 slides: the page stays one that a browser opens."""
        found = {}
        for row in self.slides[:200]:
            uri = store.join(self.output, row.id, "overlay.png")
            if row.status in ("done", "partial") and store.exists(uri):
                found[row.id] = store.read_bytes(uri)
        return found


def exit_code(statuses: Sequence[str], *, saved: bool = True) -> int:
    """Return 0 when every slide succeeded (and the report was ``saved``), 4 when every one failed, else 3."""
    if all(status in ("done", "empty") for status in statuses):
        return 0 if saved else 3
    return 4 if all(status == "failed" for status in statuses) else 3


def load_report(output: str, recipe: Recipe, tasks: Sequence[SlideTask]) -> RunReport:
    """The report of a run that has ended, from report.json. StorageError when it is not there, or no report."""
    uri = store.join(output, "report.json")
    try:
        facts = json.loads(store.read_bytes(uri))
        rows = {row["id"]: _load_row(row) for row in facts["slides"]}
        seconds = float(facts["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{store.redact(uri)} is no report of a run; run again, which resumes") from error
    return RunReport(output, recipe, tuple(task.id for task in tasks), rows, seconds=seconds)


def _load_row(row: dict[str, Any]) -> SlideRow:
    extra = {name: value for name, value in row.items() if name not in FACTS}
    return SlideRow(**{name: row[name] for name in FACTS}, extra=extra)


# ---------------------------------------------------------------- rows and texts


def make_row(state: SlideState, totals: SlideTotals) -> SlideRow:
    """The row of a slide that has ended; one that an earlier run published keeps the numbers of its slide.json."""
    recipe, summary = state.task.recipe, state.summary
    tiles = summary.tiles if summary and state.resumed else state.tiles
    mpp_effective = summary.mpp_effective if summary else None
    status = state.status or SlideStatus.FAILED
    error = unreadable_text(state) if status is SlideStatus.PARTIAL else state.error
    return SlideRow(
        id=state.task.id,
        uri=store.redact(state.task.uri),
        status=status.value,
        error=error or None,
        mpp_requested=recipe.mpp,
        mpp_effective=mpp_effective or (state.plan.mpp_effective if state.plan else None),
        tiles=tiles,
        failed_tiles=len(state.failed),
        objects=summary.object_count if summary else 0,
        seconds=round(state.seconds, 3),
        tiles_per_s=round(tiles / state.seconds, 2) if state.seconds and not state.resumed else 0.0,
        busy_share=round(busy_share(totals.busy, state.seconds), 4),
        bytes_read=sum(totals.bytes_read.values()),
        cache_hits=tiles if state.resumed else totals.cache_hits,
        peak_rss_mb=round(sum(totals.peak_rss_mb.values()), 1),
        extra=_extra_facts(state, totals),
    )


def _extra_facts(state: SlideState, totals: SlideTotals) -> dict[str, object]:
    summary, began = state.summary, totals.forward_started
    first_busy = min((start for _, start, _ in totals.busy), default=0.0)  # with this slide or a neighbour
    files = summary.files if summary else {}
    return {
        "resumed": state.resumed,
        "failures": [[x, y, x + width, y + height] for x, y, width, height in sorted(state.failed)],
        "stages": {step: round(seconds, 3) for step, seconds in sorted(totals.steps.items())},
        "features_s": round(max(0.0, totals.forward_ended - began), 3),
        "model_began_s": round(max(0.0, first_busy - began), 3),
        "classes": summary.classes if summary else {},
        **({"answers": summary.answers} if summary and summary.answers is not None else {}),
        "files": {k: store.join(store.redact(state.task.output), v) for k, v in files.items()},
        "device": ", ".join(sorted(totals.devices)) or None,
        "encoder": [json.loads(facts) for facts in sorted(set(totals.encoders.values()))],
        **({"tile_cache": state.tile_cache} if state.tile_cache else {}),
        **({"warning": text} if state.plan and (text := enlarged_text(state.plan)) else {}),
        "reader": (summary and summary.reader) or (state.plan.info.reader if state.plan else None),
        "time": round_seconds(totals.seconds),
        **({"traceback": state.traceback} if state.traceback else {}),  # only for faults that are not the user's
    }


def unreadable_text(state: SlideState) -> str:
    """The fault of a slide that is published in part, and how to mend it."""
    x, y, _, _ = min(state.failed, key=lambda tile: (tile[1], tile[0]))
    count = f"{len(state.failed)} of {state.tiles} tiles hold pixels that cannot be read (first at x={x}, y={y}"
    return f"{count}; all are in report.json): copy the slide again, then run again"


def outcome_text(state: SlideState, cache_hits: int = 0) -> str:
    """How a slide ended: objects, tiles and seconds, or the reason of a failure."""
    if state.status is SlideStatus.FAILED:
        return f"failed: {state.error}"
    summary = state.summary
    count = summary.object_count if summary else 0
    objects = f"{count:,} object{'s' * (count != 1)} in " if summary and summary.objects else ""
    if summary and state.resumed:
        return f"{summary.status} before, {objects}{summary.tiles:,} tiles; the option force redoes it"
    rate = f" ({state.tiles / state.seconds:.1f} tiles/s)" if state.seconds and state.tiles > cache_hits else ""
    reasons = {
        SlideStatus.EMPTY: " (no tissue found)",
        SlideStatus.PARTIAL: f" ({len(state.failed)} tiles cannot be read)",
    }
    reason = reasons.get(state.status, "") if state.status else ""
    size = f"{objects}{state.tiles:,} tile{'s' * (state.tiles != 1)}"
    return f"{state.status}{reason}, {size}, {state.seconds:.1f} s{rate}"


# ---------------------------------------------------------------- around a run


def versions() -> dict[str, str]:
    """Versions of Python and of the packages results may depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def check_writable(output: str) -> None:
    """Raise OutputError now rather than after an hour when nothing can be written at ``output``."""
    probe = store.join(output, f".wsi-mmm-probe-{uuid.uuid4().hex[:8]}")  # two runs may begin at once
    try:
        store.write_bytes(probe, b"wsi-mmm")
        store.delete(probe)
    except StorageError as error:
        reason = str(error).removeprefix(f"{store.redact(probe)}: ")
        remedy = "" if "; " in reason else "; choose another folder"
        raise OutputError(f"cannot write to {store.redact(output)}: {reason}{remedy}") from error


def known_exports(formats: str | Sequence[str], *, slide: object) -> tuple[str, ...]:
    """The export formats asked for; OptionError names one that does not exist, or lacks its ``slide`` model."""
    wanted = (formats,) if isinstance(formats, str) else tuple(formats)
    of_slides = (*slide_vectors.SLIDE_FORMATS, *slide_vectors.TABLE_FORMATS)
    for name in wanted:
        if name not in (*exports.FORMATS, *of_slides):
            raise OptionError(f"unknown export {name!r}; known: {', '.join((*exports.FORMATS, *of_slides))}")
        if name in of_slides and slide is None:
            raise OptionError(f"the export {name!r} is of slides' vectors: give slide too, such as slide='mean'")
    return wanted


def export_features(report: RunReport, formats: Sequence[str]) -> None:
    """Also write each slide's features or vector in other formats, beside its features.zarr, and tables of slides."""
    for name in formats:
        of_slides = name in slide_vectors.TABLE_FORMATS or name in slide_vectors.SLIDE_FORMATS
        rows = [row for row in report.slides if row.status in ("done", "partial")]
        rows = [row for row in rows if not of_slides or "slide" in row.extra.get("files", {})]
        sources = [store.join(report.output, row.id, "features.zarr") for row in rows]
        if name in slide_vectors.TABLE_FORMATS:
            if sources:
                slide_vectors.export_table(sources, slide_vectors.table_file(report.output, name), name)
            continue
        for source in sources:
            slide_vectors.export_file(source, slide_vectors.file_beside(source, name), name)
