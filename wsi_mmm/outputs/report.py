"""The run report: `report_json` for machines, `report_html` as one page that needs no other file."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any
from urllib.parse import quote

from PIL import Image

from wsi_mmm.errors import printable
from wsi_mmm.outputs.report_style import STYLE

_PICTURE = 1100  # px, the longer side of an embedded picture
_FAILURES = 50  # listed per slide; report.json has all
_COLORS = ("#3d6fd8", "#e08a1e", "#3a9d6e", "#b0528f", "#7a6ff0", "#8b8f98", "#c2513a")


@dataclass(frozen=True, slots=True)
class SlideRow:
    """The result of one slide.

    ``status``: done | empty | partial | failed | cancelled. ``extra`` may hold ``failures`` (level-0 rectangles
    [x0, y0, x1, y1] that could not be read), ``stages``, ``time`` (name -> seconds), ``files`` (name -> URI),
    ``classes`` (task -> class -> count), ``answers`` (column -> prediction of a bag task for the slide), ``resumed``
    (the cost is that of the run that did the slide, ``this_run`` that of looking at it),
    ``reader``, ``device``, ``encoder`` (chosen by the model's runner, per process), ``features_s`` (from the first
    tile asked for to the last value stored), ``model_began_s`` (after that).
    """

    id: str
    uri: str
    status: str
    error: str | None
    mpp_requested: float | None
    mpp_effective: float | None
    tiles: int
    failed_tiles: int
    objects: int
    seconds: float
    tiles_per_s: float
    busy_share: float
    bytes_read: int
    cache_hits: int
    peak_rss_mb: float
    extra: Mapping[str, Any] = field(default_factory=dict)


FACTS = tuple(one.name for one in fields(SlideRow) if one.name != "extra")


def report_json(facts: Mapping[str, Any], slides: Sequence[SlideRow]) -> bytes:
    """``facts`` of the run (versions, recipe, argv; the caller keeps secrets out) and ``slides``, one object each."""
    whole = _json_value({**facts, "slides": [row_json(row) for row in slides]})
    return (json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n").encode()


def row_json(row: SlideRow) -> dict[str, Any]:
    """One row as a JSON object."""
    facts = {name: getattr(row, name) for name in FACTS}
    return {str(name): _json_value(value) for name, value in {**facts, **row.extra}.items()}


def _json_value(value: Any) -> Any:
    """NaN and infinity are no JSON: null instead. Names that are no UTF-8: see `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {printable(str(key)): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return value


def report_html(
    facts: Mapping[str, Any], slides: Sequence[SlideRow], overlays: Mapping[str, bytes] | None = None
) -> bytes:
    """The page; ``overlays``: slide id -> PNG. Everything that comes from slides or users is escaped."""
    cards = "".join(_slide_card(n, row, (overlays or {}).get(row.id)) for n, row in enumerate(slides, 1))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>wsi-mmm report</title>',
        f"<style>{STYLE}</style></head><body><main>",
        _page_header(facts, slides),
        _slides_table(slides),
        _workers_table(facts.get("workers") or []),
        f'<section class="cards">{cards}</section>',
        _run_facts(facts),
        "</main></body></html>\n",
    ]
    return "".join(parts).encode()


# ---------------------------------------------------------------- parts of the page


def _page_header(facts: Mapping[str, Any], slides: Sequence[SlideRow]) -> str:
    states = Counter(row.status for row in slides)
    chips = " ".join(f"{_status_chip(state, f'{count} {state}')}" for state, count in sorted(states.items()))
    tiles, seconds = sum(row.tiles for row in slides), float(facts.get("seconds") or 0)
    now = sum(row.tiles for row in slides if not row.extra.get("resumed"))  # tiles of slides that this run did
    read = sum((row.extra.get("this_run") or {"bytes_read": row.bytes_read})["bytes_read"] for row in slides)
    totals = [
        ("slides", f"{len(slides):,}"),
        ("tiles", f"{tiles:,}"),
        ("objects", f"{sum(row.objects for row in slides):,}"),
        ("wall time", _seconds_text(seconds)),
        ("tiles/s", f"{now / seconds:,.1f}" if seconds else "–"),
        ("read", _bytes_text(read)),
    ]
    warnings = "".join(f'<p class="error">{_html_text(text)}</p>' for text in facts.get("warnings") or ())
    boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in totals)
    return (
        f"<header><h1>wsi-mmm <small>{_html_text(facts.get('wsi_mmm_version', ''))}</small></h1>{warnings}"
        f"<p>{_html_text(facts.get('started', ''))} · {_html_text(facts.get('device', ''))} {chips}</p></header>"
        f'<section class="figures">{boxes}</section>'
    )


def _slides_table(slides: Sequence[SlideRow]) -> str:
    heads = (
        "slide", "status", "mpp asked", "mpp used", "tiles", "failed", "objects", "time", "tiles/s", "model busy",
        "read", "cache hits", "peak MB",
    )  # fmt: skip
    return _html_table(heads, (_slide_cells(n, row) for n, row in enumerate(slides, 1)))


def _html_table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _slide_cells(number: int, row: SlideRow) -> list[str]:
    return [
        f'<a href="#slide-{number}" title="{_html_text(row.uri)}">{_html_text(row.id)}</a>',
        _status_chip(row.status),
        _number_text(row.mpp_requested, 4),
        _number_text(row.mpp_effective, 4),
        f"{row.tiles:,}",
        f"<em>{row.failed_tiles:,}</em>" if row.failed_tiles else "0",
        f"{row.objects:,}",
        _seconds_text(row.seconds),
        _number_text(row.tiles_per_s, 1),
        _share_meter(row.busy_share),
        _bytes_text(row.bytes_read),
        f"{row.cache_hits:,}",
        f"{row.peak_rss_mb:,.0f}",
    ]


def _workers_table(workers: Sequence[Mapping[str, Any]]) -> str:
    """A row per worker process: wall time, threads, and in what their time was spent, in shares."""
    if not workers:
        return ""
    heads = ("worker", "threads", "wall", "units", "tiles", *map(_html_text, workers[0]["time"]))
    return f"<h2>Workers</h2>{_html_table(heads, map(_worker_cells, workers[:200]))}"


def _worker_cells(one: Mapping[str, Any]) -> list[str]:
    total = one["threads"] * one["seconds"]
    shares = [f"{100 * seconds / total:.0f} %" if total else "–" for seconds in one["time"].values()]
    counts = [f"{one['threads']}", _seconds_text(one["seconds"]), f"{one['units']:,}", f"{one['tiles']:,}"]
    return [_html_text(one["worker"]), *counts, *shares]


def _slide_card(number: int, row: SlideRow, overlay: bytes | None) -> str:
    files = row.extra.get("files") or {}
    picture = f'<img alt="overlay of {_html_text(row.id)}" src="{_data_uri(overlay)}">' if overlay else ""
    if overlay and "overlay" in files:
        picture = _file_link(row.id, files["overlay"], picture)
    error = f'<p class="error">{_html_text(row.error)}</p>' if row.error else ""
    return (
        f'<article id="slide-{number}"><h2>{_html_text(row.id)} {_status_chip(row.status)}</h2>'
        f'<p class="uri">{_html_text(row.uri)}</p>{error}'
        f"{picture}{_precision_lines(row.extra.get('encoder') or [])}"
        f"{_stage_bars(row.extra.get('time') or row.extra.get('stages') or {})}"
        f"{_class_counts(row.extra.get('classes') or {})}{_answer_list(row.extra.get('answers') or {})}"
        f"{_failure_list(row.extra.get('failures') or [])}{_file_list(row.id, files)}</article>"
    )


def _file_link(slide: str, uri: str, html: str) -> str:
    """``html`` as a link to a file of a slide's folder, which lies beside the report; unchanged for other files."""
    _, found, name = uri.rpartition(f"/{slide}/")
    return f'<a href="{_html_text(quote(printable(f"./{slide}/{name}")))}">{html}</a>' if found else html


def _stage_bars(stages: Mapping[str, float]) -> str:
    """Where time went: one bar, parts as wide as their share (stages of several threads add up)."""
    total = sum(stages.values())
    if total <= 0:
        return ""
    x, bars, keys = 0.0, [], []
    for k, (name, seconds) in enumerate(sorted(stages.items(), key=lambda item: -item[1])):
        width, color = 100 * seconds / total, _COLORS[k % len(_COLORS)]
        bars.append(f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="6" fill="{color}"/>')
        keys.append(f'<li><i style="background:{color}"></i>{_html_text(name)} {_seconds_text(seconds)}</li>')
        x += width
    svg = f'<svg viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="time">{"".join(bars)}</svg>'
    return f'<h3>Where time went</h3>{svg}<ul class="keys">{"".join(keys)}</ul>'


def _precision_lines(encoders: Sequence[Mapping[str, Any]]) -> str:
    """What networks computed in, where that is less than float32, and how far it was from that."""
    lines = []
    for one in encoders:
        apart = one.get("difference")
        if isinstance(apart, Mapping):
            lines.append(
                f"<p>Computed in {_html_text(one.get('precision'))}: on the first {_html_text(apart.get('tiles'))} "
                f"tiles the cosine to float32 is at least {_html_text(apart.get('cosine'))}, and numbers differ by at "
                f"most {_html_text(apart.get('largest'))} of the largest.</p>"
            )
    return "".join(dict.fromkeys(lines))


def _class_counts(classes: Mapping[str, Mapping[str, int]]) -> str:
    lines = []
    for task, counts in classes.items():
        said = ", ".join(f"{_html_text(name)} {count:,}" for name, count in counts.items())
        lines.append(f"<li><b>{_html_text(task)}</b> {said}</li>")
    return f"<h3>Found</h3><ul>{''.join(lines)}</ul>" if lines else ""


def _answer_list(answers: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<li><b>{_html_text(name)}</b> {_html_text('–' if value is None else value)}</li>"
        for name, value in answers.items()
    )
    return f"<h3>Predictions for the slide</h3><ul>{lines}</ul>" if lines else ""


def _failure_list(failures: Sequence[Sequence[int]]) -> str:
    if not failures:
        return ""
    shown = "".join(f"<li>{_html_text(_area_text(area))}</li>" for area in failures[:_FAILURES])
    more = f"<p>… and {len(failures) - _FAILURES:,} more in report.json</p>" if len(failures) > _FAILURES else ""
    return (
        f'<details open class="failures"><summary>{len(failures):,} areas could not be read (level-0 px)</summary>'
        f"<ul>{shown}</ul>{more}</details>"
    )


def _area_text(area: Sequence[int]) -> str:
    if len(area) != 4:
        return ", ".join(map(str, area))
    x0, y0, x1, y1 = area
    return f"x {x0}–{x1}, y {y0}–{y1}"


def _file_list(slide: str, files: Mapping[str, str]) -> str:
    lines = "".join(
        f"<li>{_html_text(name)}: {_file_link(slide, uri, f'<code>{_html_text(uri)}</code>')}</li>"
        for name, uri in files.items()
    )
    return f"<details><summary>Files</summary><ul>{lines}</ul></details>" if lines else ""


def _run_facts(facts: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in facts.items() if name != "slides"}
    text = json.dumps(_json_value(shown), indent=1, ensure_ascii=False, default=str)
    return f'<details class="about"><summary>How this run was made</summary><pre>{_html_text(text)}</pre></details>'


# ---------------------------------------------------------------- words and numbers


def _html_text(value: object) -> str:
    return escape(printable(str(value)), quote=True)


def _status_chip(status: str, text: str | None = None) -> str:
    kind = status if status in ("done", "empty", "partial", "failed", "cancelled") else "other"
    return f'<span class="chip {kind}">{_html_text(text or status)}</span>'


def _share_meter(share: float) -> str:
    width = min(max(share if math.isfinite(share) else 0.0, 0.0), 1.0)
    return f'<span class="meter"><i style="width:{100 * width:.0f}%"></i></span> {100 * width:.0f} %'


def _number_text(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _seconds_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _data_uri(png: bytes) -> str:
    """A data URI, made smaller: the page holds many of them."""
    with Image.open(io.BytesIO(png)) as image:
        small = image.convert("RGB")
        small.thumbnail((_PICTURE, _PICTURE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
