"""The inputs of a job: its mode, its slide, its regions of interest. JobError says what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import geojson
import numpy as np

from wsi_mmm.empaia.bodies import Wsi
from wsi_mmm.empaia.client import AppApi, Mode
from wsi_mmm.empaia.geometry import Area, area_of
from wsi_mmm.errors import JobError, PlatformError, WsiError
from wsi_mmm.slides.service.info import parse_slide_info
from wsi_mmm.types import F64

SLIDE, REGIONS = "slide", "regions"
"""Inputs of the EAD."""

CORNERS = 256  # of the polygon that stands for a circle: its area is 0.01 % smaller
_MOST_REGIONS = 10_000
_GONE = (400, 404, 422)


@dataclass(frozen=True, slots=True)
class Region:
    """A region of interest: the id of its annotation, and what of it lies on the slide."""

    id: str
    area: Area


@dataclass(frozen=True, slots=True)
class JobInputs:
    """The mode, slide and regions of a job. ``regions``: empty in preprocessing, where the whole slide is meant."""

    mode: Mode
    wsi: Wsi
    regions: tuple[Region, ...] = ()


async def read_job_inputs(api: AppApi) -> JobInputs:
    """Read them from the platform. Raises JobError, PlatformError."""
    mode = await api.mode()
    if mode not in (Mode.standalone, Mode.preprocessing):
        raise JobError(f"This app cannot run in {mode.lower()} mode, only in standalone or preprocessing mode.")
    wsi = read_slide(await _read_input(api, SLIDE, "slide"))
    if mode is Mode.preprocessing:
        return JobInputs(mode, wsi)
    return JobInputs(mode, wsi, tuple(read_regions(await _read_input(api, REGIONS, "regions of interest"), wsi)))


async def _read_input(api: AppApi, key: str, what: str) -> object:
    try:
        return await api.input(key)
    except PlatformError as error:
        if error.status in _GONE:
            raise JobError(f"The job has no {what}.") from error
        raise


def read_slide(value: object) -> Wsi:
    """The slide of an input. JobError when it cannot be worked on."""
    try:
        info = parse_slide_info(value, uri="the slide", fingerprint=str)
        assert isinstance(value, Mapping)  # parse_slide_info has read it
        slide_id = value["id"]
    except (KeyError, WsiError) as error:
        raise JobError("The platform's description of the slide cannot be used.") from error
    if info.mpp_x is None or info.mpp_y is None:
        raise JobError("The slide does not say its resolution (the size of a pixel), so it cannot be analysed.")
    return Wsi(str(slide_id), info.width, info.height, info.mpp_x * 1000)


def read_regions(value: object, wsi: Wsi) -> Iterator[Region]:
    """The regions of an input, in order. JobError for none, for one outside of the slide, for one without area."""
    items = value.get("items") if isinstance(value, Mapping) else None
    if not isinstance(items, list) or not items:
        raise JobError("No region of interest is given; draw one and start the job again.")
    if len(items) > _MOST_REGIONS:
        raise JobError(f"The job has more than {_MOST_REGIONS} regions of interest.")
    for number, item in enumerate(items, 1):
        yield _read_region(item, number, wsi)


def regions_geojson(regions: tuple[Region, ...]) -> bytes:
    """The regions as a GeoJSON file of polygons in level-0 px."""
    features = [geojson.Feature(geometry=region.area.shape) for region in regions]
    return str(geojson.dumps(geojson.FeatureCollection(features))).encode()


def _read_region(item: object, number: int, wsi: Wsi) -> Region:
    try:
        if not isinstance(item, Mapping) or not isinstance(item["id"], str):
            raise TypeError
        ring, region_id = _read_ring(item), item["id"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise JobError(f"Region of interest {number} is no rectangle, polygon or circle that can be used.") from error
    area = area_of(ring, wsi)
    if area is None:
        raise JobError(f"Region of interest {number} lies outside of the slide, or has no area.")
    return Region(region_id, area)


def _read_ring(item: Mapping[str, object]) -> F64:
    """The outline float64[n, 2] of a shape as the platform writes it, not closed."""
    kind = item["type"]
    if kind == "rectangle":
        corner, size = np.array([item["upper_left"], (item["width"], item["height"])], np.float64).reshape(2, 2)
        return np.asarray(corner + size * [(0, 0), (1, 0), (1, 1), (0, 1)], np.float64)
    if kind == "circle":
        angle = np.arange(CORNERS) * (2 * np.pi / CORNERS)
        centre, radius = np.array(item["center"], np.float64), np.array(item["radius"], np.float64)
        return np.asarray(centre + radius * np.column_stack([np.cos(angle), np.sin(angle)]), np.float64)
    if kind == "polygon":
        return np.array(item["coordinates"], np.float64).reshape(-1, 2)
    raise ValueError(kind)
