"""The run report: a row per slide as it ends, report.json and report.html at the end."""

from __future__ import annotations

import json
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from wsi_mmm._version import __version__
from wsi_mmm.engine.monitoring.accounting import Seconds, TimeAccounting, rounded
from wsi_mmm.engine.recipe import Recipe
from wsi_mmm.engine.scheduler import SlideState, busy_share
from wsi_mmm.engine.units import SlideTask
from wsi_mmm.errors import OptionError, OutputError, StorageError
from wsi_mmm.outputs import exports
from wsi_mmm.outputs.report import SlideRow, report_html, report_json
from wsi_mmm.outputs.slides_table import slides_csv, slides_parquet
from wsi_mmm.storage import store

_PACKAGES = ("torch", "timm", "openslide-python", "openslide-bin", "zarr", "dask", "shapely", "numpy")


@dataclass(slots=True)
class RunReport:
    """What became of a run. ``slides``: one SlideRow each, in the order asked for.

    ``exit_code``: 0 every slide succeeded, 3 some failed or have tiles that could not be read, 4 none succeeded.
    ``unsaved``: why report.json and report.html could not be written; then a code of 0 is 3, too.
    ``ledger``: where the time went, from the works and receipts that it is shown.
    """

    output: str
    recipe: Recipe
    order: tuple[str, ...]
    rows: dict[str, SlideRow] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    device: str = ""
    unsaved: str = ""
    ledger: TimeAccounting = field(default_factory=TimeAccounting)

    @property
    def slides(self) -> list[SlideRow]:
        """Rows of the slides that have ended."""
        return [self.rows[name] for name in self.order if name in self.rows]

    @property
    def path(self) -> str:
        """Where report.html lies."""
        return store.join(self.output, "report.html")

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ran this; slides that never ended count as failed."""
        missing = ["failed"] * (len(self.order) - len(self.slides))
        return exit_code([*(row.status for row in self.slides), *missing], saved=not self.unsaved)

    def add(self, state: SlideState) -> None:
        """Take in a slide that has ended."""
        self.rows[state.task.id] = row_of(state, self.ledger.slide(state.task.id))

    def save(self) -> None:
        """Write report.json and report.html, whole; the slides' results stand even when that fails (``unsaved``)."""
        try:
            self._save()
        except StorageError as error:
            self.unsaved = str(error)

    def _save(self) -> None:
        self.seconds = time.time() - self.started
        facts = {
            "wsi_mmm_version": __version__, "versions": versions(), "recipe": self.recipe.to_json(),
            "recipe_hash": self.recipe.result_hash(),
            "argv": [store.redact(word) for word in sys.argv],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(self.seconds, 3),
            "device": self._device(), "slides_asked": len(self.order), "workers": self.ledger.rows(),
        }  # fmt: skip
        store.write_bytes(store.join(self.output, "report.json"), report_json(facts, self.slides))
        if any("answers" in row.extra for row in self.slides):
            store.write_bytes(store.join(self.output, "slides.csv"), slides_csv(self.slides))
            store.write_bytes(store.join(self.output, "slides.parquet"), slides_parquet(self.slides))
        store.write_bytes(self.path, report_html(facts, self.slides, self._overlays()))

    def _device(self) -> str:
        """What the model ran on; what was asked for when it ran nowhere (all slides resumed, failed or empty)."""
        used = {str(row.extra["device"]) for row in self.rows.values() if row.extra.get("device")}
        return ", ".join(sorted(used)) or self.recipe.options.device

    def _overlays(self) -> dict[str, bytes]:
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


def begin(output: str, recipe: Recipe, tasks: Iterable[SlideTask]) -> RunReport:
    """A report with no rows yet."""
    return RunReport(output, recipe, tuple(task.id for task in tasks))


def row_of(state: SlideState, time_of: Seconds | None = None) -> SlideRow:
    """A slide's row from what its receipts added up to; one that was published before keeps what slide.json says.

    ``time_of``: seconds per stage, of the ledger.
    """
    recipe, facts = state.task.recipe, state.payload if isinstance(state.payload, dict) else {}
    seconds = max(0.0, state.ended - state.started)
    skipped = state.status == "skipped"
    tiles = int(facts.get("tiles", 0)) if skipped else state.tiles
    return SlideRow(
        id=state.task.id,
        uri=store.redact(state.task.uri),
        status=str(facts.get("status", "done")) if skipped else state.status,
        error=state.error or None,
        mpp_requested=recipe.mpp,
        mpp_effective=facts.get("mpp_effective") or (state.plan.mpp_effective if state.plan else None),
        tiles=tiles,
        failed_tiles=len(state.failed),
        objects=sum(facts.get("objects", {}).values()) if facts else 0,
        seconds=round(seconds, 3),
        tiles_per_s=round(tiles / seconds, 2) if seconds and not skipped else 0.0,
        busy_share=round(busy_share(state), 4),
        bytes_read=sum(state.bytes_read.values()),
        cache_hits=tiles if skipped else state.cache_hits,
        peak_rss_mb=round(sum(state.peak_rss_mb.values()), 1),
        extra=_extra(state, facts, resumed=skipped) | ({"time": rounded(time_of)} if time_of else {}),
    )


def _extra(state: SlideState, facts: dict[str, Any], *, resumed: bool) -> dict[str, Any]:
    return {
        "resumed": resumed,
        "failures": [[x, y, x + width, y + height] for x, y, width, height in sorted(state.failed)],
        "stages": {name: round(seconds, 3) for name, seconds in sorted(state.stages.items())},
        "features_s": round(max(0.0, state.forward_span[1] - state.forward_span[0]), 3),
        "model_began_s": round(max(0.0, _first_busy(state) - state.forward_span[0]), 3),
        "classes": facts.get("classes", {}),
        **({"answers": facts["answers"]} if "answers" in facts else {}),
        "files": {k: store.join(store.redact(state.task.output), v) for k, v in facts.get("files", {}).items()},
        "device": ", ".join(sorted(state.devices)) or None,
        "encoder": [json.loads(facts) for facts in sorted(set(state.encoders.values()))],
        **({"tile_cache": state.tile_cache} if state.tile_cache else {}),
        "reader": facts.get("reader") or (state.plan.info.reader if state.plan else None),
        **({"traceback": state.traceback} if state.traceback else {}),  # only for faults that are not the user's
    }


def _first_busy(state: SlideState) -> float:
    """Epoch seconds at which the model began with this slide or a neighbour of it; 0 when it never did."""
    return min((start for _, start, _ in state.busy), default=0.0)


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


def known_exports(formats: str | Sequence[str]) -> tuple[str, ...]:
    """The export formats asked for; OptionError names one that does not exist."""
    wanted = (formats,) if isinstance(formats, str) else tuple(formats)
    for name in wanted:
        if name not in exports.FORMATS:
            raise OptionError(f"unknown export {name!r}; known: {', '.join(exports.FORMATS)}")
    return wanted


def export_features(report: RunReport, formats: Sequence[str]) -> None:
    """Also write each slide's features as "h5" or "pt", beside its features.zarr."""
    for name in formats:
        for row in report.slides:
            if row.status in ("done", "partial"):
                source = store.join(report.output, row.id, "features.zarr")
                exports.export(source, store.join(report.output, row.id, f"features.{name}"))
