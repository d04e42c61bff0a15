"""Parse a slide service's description of a slide: every value is checked, and optional ones may be missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from wsi_mmm.errors import SlideDamaged
from wsi_mmm.types import Level, SlideInfo

_MOST_LEVELS, _MOST_SIDE = 64, 1 << 30
_TILE = 256
_ASIDE = ("id", "format", "tissue", "stain", "block")  # texts that are kept as properties


def parse_slide_info(said: object, *, uri: str, fingerprint: Callable[[], str]) -> SlideInfo:
    """Return the slide of an EMPAIA SlideInfo (or a ``wsi`` input). Raises SlideDamaged.

    ``fingerprint`` computes the slide's. Required are ``extent`` and ``levels``; a resolution that is missing or not
    above 0 is unknown.
    """
    try:
        if not isinstance(said, Mapping):
            raise TypeError("no object")
        width, height = _parse_sides(said["extent"])
        tile = _tile_sides(said.get("tile_extent"))
        levels = tuple(_parse_level(entry, (width, height), tile) for entry in said["levels"][: _MOST_LEVELS + 1])
        _check_levels(said, levels, (width, height))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SlideDamaged(
            f"{uri}: the service's description of the slide cannot be used ({error}); is it a WSI service of v3?"
        ) from None
    size = said.get("pixel_size_nm")
    sides = size if isinstance(size, Mapping) else {}
    return SlideInfo(
        uri=uri, width=width, height=height, levels=levels,
        mpp_x=_to_micrometres(sides.get("x")), mpp_y=_to_micrometres(sides.get("y")),
        vendor=str(said.get("format") or "unknown")[:80], reader="wsi-service", fingerprint=fingerprint,
        properties={name: said[name][:200] for name in _ASIDE if isinstance(said.get(name), str)},
    )  # fmt: skip


def storage_path(said: object) -> str:
    """Return the path of a slide in the answer of a storage mapper, old or new; empty when it is none."""
    if not isinstance(said, Mapping):
        return ""
    new, old = said.get("main_storage_address"), said.get("storage_addresses")
    if isinstance(new, Mapping):
        return str(new.get("path") or "")
    entries = [entry for entry in old if isinstance(entry, Mapping)] if isinstance(old, list) else []
    main = [entry for entry in entries if entry.get("main_address")] or entries
    return str(main[0].get("address") or "") if main else ""


def _check_levels(said: Mapping[str, Any], levels: tuple[Level, ...], top: tuple[int, int]) -> None:
    if not levels or len(levels) > _MOST_LEVELS:
        raise ValueError(f"{len(levels)} levels")
    if (levels[0].width, levels[0].height) != top:
        raise ValueError("level 0 is not of the slide's size")
    if any(level.width > top[0] or level.height > top[1] for level in levels):
        raise ValueError("a level is larger than the slide")
    depth = said.get("channel_depth")
    if depth not in (None, 8):
        raise ValueError(f"{depth} bits a channel, 8 can be read")


def _parse_level(entry: Mapping[str, Any], top: tuple[int, int], tile: tuple[int, int]) -> Level:
    width, height = _parse_sides(entry["extent"])
    return Level(width, height, top[0] / width, top[1] / height, *tile)


def _parse_sides(extent: Mapping[str, Any]) -> tuple[int, int]:
    x, y = extent["x"], extent["y"]
    if not all(type(side) is int and 0 < side <= _MOST_SIDE for side in (x, y)):
        raise ValueError("an extent that is no size")
    return x, y


def _tile_sides(extent: object) -> tuple[int, int]:
    try:
        return _parse_sides(extent)  # type: ignore[arg-type]  # checked by what it raises
    except (KeyError, TypeError, ValueError):
        return _TILE, _TILE


def _to_micrometres(nanometres: object) -> float | None:
    if isinstance(nanometres, bool) or not isinstance(nanometres, (int, float)):
        return None
    return nanometres / 1000 if 0 < nanometres < math.inf else None
