"""What a slide service says of a slide, made ours. Nothing it claims is trusted; what may be missing may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from wsi_mmm.errors import SlideDamaged
from wsi_mmm.types import Level, SlideInfo

_MOST_LEVELS, _MOST_SIDE = 64, 1 << 30
_TILE = 256
_ASIDE = ("id", "format", "tissue", "stain", "block")  # texts that are kept


def parsed(data: bytes) -> Any:
    """Return the JSON value of an answer, None when it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def info_of(said: object, *, uri: str, mark: Callable[[], str]) -> SlideInfo:
    """Return the slide of an EMPAIA SlideInfo (or a ``wsi`` input). Raises SlideDamaged.

    ``mark`` finds its fingerprint. Wanted are ``extent`` and ``levels``; a resolution that is missing or not above 0
    is unknown.
    """
    try:
        if not isinstance(said, Mapping):
            raise TypeError("no object")
        width, height = _sides(said["extent"])
        tile = _tile(said.get("tile_extent"))
        levels = tuple(_level(entry, (width, height), tile) for entry in said["levels"][: _MOST_LEVELS + 1])
        _check(said, levels, (width, height))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SlideDamaged(
            f"{uri}: the service's description of the slide cannot be used ({error}); is it a WSI service of v3?"
        ) from None
    size = said.get("pixel_size_nm")
    sides = size if isinstance(size, Mapping) else {}
    return SlideInfo(
        uri=uri, width=width, height=height, mpp_x=_micrometres(sides.get("x")), mpp_y=_micrometres(sides.get("y")),
        levels=levels, vendor=str(said.get("format") or "unknown")[:80], reader="wsi-service", fingerprint=mark,
        properties={name: said[name][:200] for name in _ASIDE if isinstance(said.get(name), str)},
    )  # fmt: skip


def stored_at(said: object) -> str:
    """Return where a storage mapper, old or new, says that a slide lies; empty when this is no answer of one."""
    if not isinstance(said, Mapping):
        return ""
    new, old = said.get("main_storage_address"), said.get("storage_addresses")
    if isinstance(new, Mapping):
        return str(new.get("path") or "")
    entries = [entry for entry in old if isinstance(entry, Mapping)] if isinstance(old, list) else []
    main = [entry for entry in entries if entry.get("main_address")] or entries
    return str(main[0].get("address") or "") if main else ""


def _check(said: Mapping[str, Any], levels: tuple[Level, ...], top: tuple[int, int]) -> None:
    if not levels or len(levels) > _MOST_LEVELS:
        raise ValueError(f"{len(levels)} levels")
    if (levels[0].width, levels[0].height) != top:
        raise ValueError("level 0 is not of the slide's size")
    if any(level.width > top[0] or level.height > top[1] for level in levels):
        raise ValueError("a level is larger than the slide")
    depth = said.get("channel_depth")
    if depth not in (None, 8):
        raise ValueError(f"{depth} bits a channel, 8 can be read")


def _level(entry: Mapping[str, Any], top: tuple[int, int], tile: tuple[int, int]) -> Level:
    width, height = _sides(entry["extent"])
    return Level(width, height, top[0] / width, top[1] / height, *tile)


def _sides(extent: Mapping[str, Any]) -> tuple[int, int]:
    x, y = extent["x"], extent["y"]
    if not all(type(side) is int and 0 < side <= _MOST_SIDE for side in (x, y)):
        raise ValueError("an extent that is no size")
    return x, y


def _tile(extent: object) -> tuple[int, int]:
    try:
        return _sides(extent)  # type: ignore[arg-type]  # whatever it is
    except (KeyError, TypeError, ValueError):
        return _TILE, _TILE


def _micrometres(nanometres: object) -> float | None:
    if isinstance(nanometres, bool) or not isinstance(nanometres, (int, float)):
        return None
    return nanometres / 1000 if 0 < nanometres < math.inf else None
