"""Pictures of a slide, drawn with Pillow: overlay.png with its objects and a few fields close up, and
attention-<task>.png with the weight of each tile in a bag task."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wsi_mmm.outputs.density import Density
from wsi_mmm.outputs.trace import trace
from wsi_mmm.types import F32, F64, I64, U8, Grid, Mask, Objects, TaskInfo

Rgb = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FINE = 3  # outlines are drawn this much larger and shrunk: smooth lines
_MARGIN, _GAP, _HEAD, _FOOT = 36, 20, 96, 64
_TALL, _WIDE, _FIELD = 920, 1280, 450  # largest slide panel; side of a close-up
_INK, _SOFT, _GROUND, _EDGE = (29, 34, 48), (102, 112, 133), (250, 250, 252), (214, 218, 228)
_BOX: Rgb = (20, 24, 36)
# Dark violet to yellow in even steps of perceived lightness (anchors of Matplotlib's plasma, CC0).
_VIOLET = (13, 8, 135), (84, 2, 163), (139, 10, 165), (185, 50, 137)
_YELLOW = (219, 92, 104), (244, 136, 73), (254, 188, 43), (240, 249, 33)
_HEAT = np.array([*_VIOLET, *_YELLOW])


@dataclass(frozen=True, slots=True)
class Field:
    """A close-up: ``pixels`` uint8[h, w, 3] whose top-left is level-0 (x0, y0), ``scale`` level-0 px per pixel."""

    pixels: U8
    x0: float
    y0: float
    scale: float
    found: Sequence[tuple[TaskInfo, Objects]] = ()


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything on the picture. ``width``, ``height``: level-0 px of the slide; ``mpp``: µm per level-0 px or None.

    ``tissue`` bool[h, w] covers the slide. ``density``: a heat map of objects. ``areas``: objects filled translucently
    with their class colour (regions, tiles). ``counts``: legend lines, (name, colour, number).
    """

    title: str
    subtitle: str
    thumbnail: U8
    width: int
    height: int
    mpp: float | None = None
    tissue: Mask | None = None
    density: Density | None = None
    areas: Sequence[tuple[TaskInfo, Objects]] = ()
    fields: Sequence[Field] = ()
    counts: Sequence[tuple[str, Rgb, int]] = field(default_factory=tuple)


def overlay_png(scene: Scene) -> bytes:
    """The PNG."""
    ratio = min(_WIDE / scene.width, _TALL / scene.height)
    size = max(1, round(scene.width * ratio)), max(1, round(scene.height * ratio))
    rows = min(2, max(1, math.ceil(len(scene.fields) / 2))) if size[0] >= size[1] else min(2, max(1, len(scene.fields)))
    columns = math.ceil(len(scene.fields) / rows) if scene.fields else 0
    left = max(size[0], 420)
    tall = max(size[1], rows * (_FIELD + _GAP) - _GAP if columns else 0)
    width = max(2 * _MARGIN + left + columns * (_FIELD + _GAP), 900)
    page = Image.new("RGB", (width, _HEAD + tall + _FOOT + _MARGIN), _GROUND)
    draw = ImageDraw.Draw(page)
    corner = (_MARGIN + (left - size[0]) // 2, _HEAD + (tall - size[1]) // 2)
    _draw_head(draw, scene, width - 2 * _MARGIN)
    page.paste(_draw_slide(scene, size), corner)
    draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1]), outline=_EDGE)
    for number, shown in enumerate(scene.fields):
        row, column = number % rows, number // rows
        place = (_MARGIN + left + _GAP + column * (_FIELD + _GAP), _HEAD + row * (_FIELD + _GAP))
        page.paste(_draw_field(shown, scene, str(number + 1)), place)
    _draw_legend(draw, page, scene, (_MARGIN, _HEAD + tall + 18))
    return _png_bytes(page)


def _png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def legend_counts(tasks: Sequence[TaskInfo], counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, Rgb, int]]:
    """Legend lines of ``counts`` (task -> class -> number), classes that do not occur left out."""
    lines = []
    for task in tasks:
        for name, color in zip(task.classes, task.colors, strict=True):
            number = counts.get(task.name, {}).get(name, 0)
            if number:
                lines.append((name, color, number))
    return lines


# ---------------------------------------------------------------- the slide


def _draw_slide(scene: Scene, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(scene.thumbnail).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    ratio = size[0] / scene.width
    for task, objects in scene.areas:
        image = _fill_areas(image, task, objects, ratio)
    if scene.density is not None:
        image = _blend_heat(image, scene.density)
    fine = Image.new("RGBA", (size[0] * 2, size[1] * 2))
    draw = ImageDraw.Draw(fine)
    if scene.tissue is not None and scene.tissue.any():
        _outline_mask(draw, scene.tissue, fine.size)
    for number, shown in enumerate(scene.fields):
        _draw_frame(draw, shown, 2 * ratio, str(number + 1))
    image.paste(small := fine.resize(size, Image.Resampling.LANCZOS), mask=small)
    _scale_bar(image, scene.mpp, 1 / ratio, share=0.2)
    return image


def _blend_heat(image: Image.Image, density: Density) -> Image.Image:
    """Heat over a paled slide: the denser, the less of the slide shows through."""
    value = density.smooth()
    level = np.clip(value / max(_full_scale(density), 1e-9), 0, 1)
    small = np.concatenate([_heat_colors(level), (255 * np.clip(1.1 * level**0.5, 0, 0.82))[..., None]], axis=-1)
    layer = Image.fromarray(small.astype(np.uint8), "RGBA").resize(image.size, Image.Resampling.BICUBIC)
    return _paint_over(image, layer, 0.25)


def _paint_over(image: Image.Image, layer: Image.Image, pale: float) -> Image.Image:
    """``layer`` (RGBA) over the image, which is mixed with ``pale`` of white before."""
    out = Image.blend(image, Image.new("RGB", image.size, (255, 255, 255)), pale)
    out.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
    return out


def _full_scale(density: Density) -> float:
    """Objects per cell that the brightest colour stands for."""
    value = density.smooth()
    return float(np.quantile(value[value > 0.01], 0.99)) if (value > 0.01).any() else 1.0


def _heat_colors(level: F64) -> F64:
    """Colours float64[..., 3] of ``level`` in [0, 1]: dark violet to yellow."""
    steps = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(level, steps, _HEAT[:, k]) for k in range(3)], axis=-1)


def _fill_areas(image: Image.Image, task: TaskInfo, objects: Objects, ratio: float) -> Image.Image:
    """Areas in their class colour, see-through; drawn large to small so that what lies in holes shows."""
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    for polygon, color in _scaled_polygons(task, objects, (0.0, 0.0), ratio):
        for number, ring in enumerate(polygon):
            draw.polygon(ring, fill=(0, 0, 0, 0) if number else (*color, 105), outline=(*color, 230))
    out = image.copy()
    out.paste(layer, mask=layer)
    return out


def _scaled_polygons(
    task: TaskInfo, objects: Objects, origin: tuple[float, float], ratio: float
) -> list[tuple[list[list[tuple[float, float]]], Rgb]]:
    points = (objects.coords - np.array(origin)) * ratio
    out = []
    for i, kind in enumerate(objects.class_index.tolist()):
        rings = range(objects.object_offsets[i], objects.object_offsets[i + 1])
        spans = [(objects.ring_offsets[r], objects.ring_offsets[r + 1]) for r in rings]
        polygon = [[(x, y) for x, y in points[a:b].tolist()] for a, b in spans if b - a >= 3]
        if polygon:
            out.append((polygon, task.colors[kind]))
    return out


def _outline_mask(draw: ImageDraw.ImageDraw, mask: Mask, size: tuple[int, int]) -> None:
    rings = trace(mask.astype(np.int32), "exact")  # pixels may be whole tiles: no corner of one is cut
    points = rings.coords * (size[0] / mask.shape[1], size[1] / mask.shape[0])
    for a, b in zip(rings.ring_offsets[:-1], rings.ring_offsets[1:], strict=True):
        ring = [(x, y) for x, y in points[a:b].tolist()]
        draw.line([*ring, ring[0]], fill=(30, 110, 90, 220), width=3, joint="curve")


def _draw_frame(draw: ImageDraw.ImageDraw, shown: Field, ratio: float, name: str) -> None:
    height, width = shown.pixels.shape[:2]
    x0, y0 = shown.x0 * ratio, shown.y0 * ratio
    x1, y1 = x0 + max(width * shown.scale * ratio, 12), y0 + max(height * shown.scale * ratio, 12)
    draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline=(255, 255, 255, 255), width=8)
    draw.rectangle((x0, y0, x1, y1), outline=(*_BOX, 255), width=4)
    above = y0 > 60
    _draw_badge(draw, (x0, y0 - 44 if above else y1 + 6), name, 34)


# ---------------------------------------------------------------- close-ups


def _draw_field(shown: Field, scene: Scene, name: str) -> Image.Image:
    height, width = shown.pixels.shape[:2]
    zoom = _FIELD / max(height, width)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    large = size[0] * _FINE, size[1] * _FINE
    big = Image.fromarray(shown.pixels).convert("RGB").resize(large, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(big)
    for task, objects in shown.found:
        for polygon, color in _scaled_polygons(task, objects, (shown.x0, shown.y0), zoom * _FINE / shown.scale):
            for ring in polygon:
                draw.line([*ring, ring[0], ring[1]], fill=(255, 255, 255), width=round(2.3 * _FINE), joint="curve")
                draw.line([*ring, ring[0], ring[1]], fill=color, width=round(1.5 * _FINE), joint="curve")
    image = Image.new("RGB", (_FIELD, _FIELD), _GROUND)
    image.paste(big.resize(size, Image.Resampling.LANCZOS))
    _scale_bar(image, scene.mpp, shown.scale / zoom, share=0.22)
    ink = ImageDraw.Draw(image)
    ink.rectangle((0, 0, _FIELD - 1, _FIELD - 1), outline=_EDGE)
    _draw_badge(ink, (10, 10), name, 20)
    return image


def _draw_badge(draw: ImageDraw.ImageDraw, corner: tuple[float, float], name: str, size: int) -> None:
    x, y = corner
    draw.rounded_rectangle((x, y, x + 1.25 * size, y + 1.25 * size), radius=size // 4, fill=_BOX)
    draw.text((x + 0.625 * size, y + 0.61 * size), name, fill=(255, 255, 255), font=_load_font(size), anchor="mm")


# ---------------------------------------------------------------- words


def _draw_head(draw: ImageDraw.ImageDraw, scene: Scene, room: float) -> None:
    _write_text(draw, (_MARGIN, 50), _shorten_text(draw, scene.title, room, size=30), size=30)
    _write_text(draw, (_MARGIN, 78), _shorten_text(draw, scene.subtitle, room, size=18), size=18, fill=_SOFT)


def _shorten_text(draw: ImageDraw.ImageDraw, text: str, room: float, *, size: int) -> str:
    """``text``, its middle left out where it is wider than ``room``: ends tell slides apart."""
    shown, keep = text, len(text)
    while keep > 8 and draw.textlength(shown, font=_load_font(size)) > room:
        keep -= 1 + keep // 20
        shown = f"{text[: keep - keep // 2]}...{text[len(text) - keep // 2 :]}"
    return shown


def _draw_legend(draw: ImageDraw.ImageDraw, page: Image.Image, scene: Scene, corner: tuple[int, int]) -> None:
    x, y = corner
    if scene.density is not None and scene.density.counts.any():
        bar = _heat_colors(np.tile(np.linspace(0, 1, 180), (14, 1))).astype(np.uint8)
        page.paste(Image.fromarray(bar), (x, y + 4))
        text = f"0 to {_per_area(scene.density, scene.mpp)}"
        x = round(_write_text(draw, (x + 192, y + 17), text, size=17, fill=_SOFT)) + 40
    for name, color, number in scene.counts:
        text = f"{name}  {number:,}"
        wide = 26 + round(draw.textlength(text, font=_load_font(17))) + 28
        if x + wide > page.width - _MARGIN:
            x, y = corner[0], y + 28
        if y + 28 > page.height:  # as many as there is room for: the report has all
            _write_text(draw, (page.width - _MARGIN, y - 11), "...", size=17, fill=_SOFT)
            return
        draw.rounded_rectangle((x, y + 3, x + 16, y + 19), radius=4, fill=color)
        _write_text(draw, (x + 26, y + 17), text, size=17)
        x += wide


def _per_area(density: Density, mpp: float | None) -> str:
    full = _full_scale(density)
    if mpp is None:
        return f"{full:,.0f} objects per {density.cell:,.0f} px square"
    return f"{full / (density.cell * mpp / 1000) ** 2:,.0f} objects/mm\u00b2"


def _scale_bar(image: Image.Image, mpp: float | None, scale: float, *, share: float) -> None:
    """A bar of a round length in the lower left corner; ``scale``: level-0 px per picture px."""
    if mpp is None:
        return
    target = share * image.width * scale * mpp
    power = 10.0 ** math.floor(math.log10(target))
    length = max((step * power for step in (1, 2, 5) if step * power <= target), default=power)
    wide = length / (scale * mpp)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} \u00b5m"
    draw = ImageDraw.Draw(image)
    x, y = 14.0, image.height - 16.0
    room = max(wide, draw.textlength(text, font=_load_font(15)))
    draw.rounded_rectangle((x - 8, y - 27, x + room + 8, y + 10), radius=5, fill=(255, 255, 255))
    draw.rectangle((x, y, x + wide, y + 3), fill=_INK)
    _write_text(draw, (x, y - 6), text, size=15)


def _write_text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, size: int, fill: Rgb = _INK
) -> float:
    """Text whose baseline begins at ``place``; returns the x where it ends.

    Pillow's own font has neither \u00b5 nor \u00b2: a u with a stem below it, and a small raised 2.
    """
    x, y = place
    for part in re.split("([\u00b5\u00b2])", text):
        small = part == "\u00b2"
        font = _load_font(round(size * 0.65)) if small else _load_font(size)
        shown = {"\u00b5": "u", "\u00b2": "2"}.get(part, part)
        draw.text((x, y - 0.35 * size * small), shown, fill=fill, font=font, anchor="ls")
        if part == "\u00b5":
            stem = x + 0.1 * size
            draw.line((stem, y - 0.3 * size, stem, y + 0.22 * size), fill=fill, width=max(1, round(size / 12)))
        x += draw.textlength(shown, font=font)
    return x


def _load_font(size: int) -> Font:
    return ImageFont.load_default(size=size)


# ---------------------------------------------------------------- attention


def attention_png(thumbnail: U8, grid: Grid, index: I64, attention: F32) -> bytes:
    """``thumbnail`` uint8[h, w, 3] of the whole slide; ``index`` int64[n, 2] (row, column) of its tiles; ``attention``
    float32[n], NaN: nothing is drawn. A tile is drawn as its own stride; colours as of `levels`."""
    height, width = thumbnail.shape[:2]
    cells = np.zeros((grid.rows, grid.columns, 4), np.uint8)
    known = ~np.isnan(attention)
    row, column = index[known].T
    cells[row, column, :3] = _heat_colors(levels(attention[known])).astype(np.uint8)
    cells[row, column, 3] = 190  # nearly opaque
    # Picture px ask which cell they lie in: tiles at the far edges reach beyond the slide.
    y = _cell_of(height, grid.height, grid.stride, grid.rows)
    x = _cell_of(width, grid.width, grid.stride, grid.columns)
    layer = Image.fromarray(cells[np.ix_(y, x)], "RGBA")
    return _png_bytes(_paint_over(Image.fromarray(thumbnail).convert("RGB"), layer, 0.4))


def levels(attention: F32) -> F64:
    """0 to 1 by rank, equal shares alike: attention is skewed, a few tiles have most of it."""
    _, place, counts = np.unique(attention, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return np.zeros(len(attention))
    middle = np.cumsum(counts) - (counts + 1) / 2
    found: F64 = ((middle - middle[0]) / (middle[-1] - middle[0]))[place]
    return found


def _cell_of(places: int, length: int, stride: int, count: int) -> I64:
    found: I64 = np.minimum((np.arange(places) + 0.5) * length / places / stride, count - 1).astype(np.int64)
    return found
