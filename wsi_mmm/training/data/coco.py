"""COCO files: pictures with boxes or instance outlines, as many annotation tools write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from wsi_mmm.errors import InputError
from wsi_mmm.plugins import import_package
from wsi_mmm.storage import store
from wsi_mmm.storage.limits import parse_json
from wsi_mmm.tasks.targets import Boxes, Target
from wsi_mmm.training.data.base import ItemIndex
from wsi_mmm.training.data.images import MAX_PX, MAX_SIDE, ImageItems, Origin, read_image
from wsi_mmm.types import I32


def coco(
    origin: Origin,
    images: str,
    annotations: str,
    *,
    task: str,
    kind: str,
    classes: Sequence[str],
    categories: Mapping[str, str] | None = None,
) -> ImageItems:
    """Pictures listed in a COCO JSON, for `detect` (boxes) or `instances` (outlines).

    ``categories``: COCO category -> class ("": left out); None: those of equal name. Crowd regions are unknown areas.
    InputError names a category that is no class, or what is wrong with the file.
    """
    root = _parse_coco(annotations)
    numbers = _category_classes(origin.name, root, classes, categories or {})
    pictures = [p for p in root["images"] if isinstance(p, dict)]
    by_picture: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for one in root["annotations"]:
        if numbers.get(one.get("category_id"), -2) != -2:
            by_picture[one.get("image_id")].append(one)
    keys = [_safe_file_name(str(p.get("file_name")), annotations) for p in pictures]
    found = [by_picture[p.get("id")] for p in pictures]
    labels = [_most_common_class(numbers, some) for some in found]

    def targets(n: int, shape: tuple[int, int]) -> Mapping[str, Target]:
        if kind == "detect":
            return {task: boxes(found[n], numbers, shape)}
        drawn = outlines(found[n], shape)
        if len(classes) < 2:
            return {task: drawn}
        table = np.array([-1, *(numbers[one["category_id"]] for one in found[n])], np.int32)
        return {task: np.stack([drawn, table[np.maximum(drawn, 0)]])}

    index = ItemIndex(keys, origin.groups(keys), np.array(labels, np.int32))
    return ImageItems(
        origin.name, (task,), index, lambda n: read_image(store.join(images, keys[n])), targets, origin.factor
    )


def boxes(found: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int], shape: tuple[int, int]) -> Boxes:
    """``bbox`` (x, y, width, height) of each annotation as Boxes; crowds get -1."""
    try:
        corners = np.array([[float(v) for v in one["bbox"]] for one in found], np.float32).reshape(-1, 4)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"an annotation has no bbox of four numbers ({error})") from error
    corners[:, 2:] += corners[:, :2]
    labels = [-1 if one.get("iscrowd") else numbers[one["category_id"]] for one in found]
    return Boxes(corners, np.array(labels, np.int32), *shape)


def outlines(found: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> I32:
    """``segmentation`` (polygons or RLE) of each annotation as int32[h, w], numbered from 1; crowds are -1."""
    tools = import_package("pycocotools.mask", "COCO outlines need pycocotools: pip install 'wsi-mmm[coco]'")
    out = np.zeros(shape, np.int32)
    for number, one in enumerate(found, start=1):
        try:
            drawn = _check_outline(one["segmentation"], shape)
            if isinstance(drawn, dict) and isinstance(drawn.get("counts"), str | bytes):
                codes: Any = drawn  # compressed already
            else:
                codes = tools.frPyObjects(drawn, *shape)
            mask = tools.decode(tools.merge(codes) if isinstance(codes, list) else codes)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"annotation {one.get('id')} has an outline that cannot be drawn ({error})") from error
        if mask.shape != shape:
            raise InputError(f"annotation {one.get('id')} is an outline of another size than its picture")
        out[mask.astype(bool)] = -1 if one.get("iscrowd") else number
    return out


def _check_outline(drawn: Any, shape: tuple[int, int]) -> Any:
    """An outline that pycocotools may draw: it trusts sizes and coordinates, and takes memory for them.

    ValueError for a mask of another size than the picture, or a polygon that leads far away from it.
    """
    if isinstance(drawn, dict):
        if list(drawn.get("size", ())) != list(shape):
            raise ValueError(f"a mask of {drawn.get('size')} px, the picture has {list(shape)}")
        return drawn
    corners = np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in drawn])
    if not (np.abs(corners) <= MAX_SIDE).all():
        raise ValueError(f"a corner beyond {MAX_SIDE} px")
    return drawn


def _parse_coco(uri: str) -> dict[str, Any]:
    root = parse_json(store.read_bytes(uri), store.redact(uri))
    named = ("images", "annotations", "categories")
    if not isinstance(root, dict) or not all(isinstance(root.get(name), list) for name in named):
        raise InputError(f"{store.redact(uri)} is no COCO file: it needs images, annotations and categories")
    for picture in root["images"]:
        sides = [picture.get(side, 0) for side in ("width", "height")] if isinstance(picture, dict) else [0, 0]
        if not all(isinstance(side, int | float) for side in sides) or sides[0] * sides[1] > MAX_PX:
            raise InputError(f"{store.redact(uri)}: {picture.get('file_name')} is too large for a patch")
    return root


def _safe_file_name(file_name: str, annotations: str) -> str:
    """The name, unless it would lead out of the folder of pictures."""
    if file_name.startswith("/") or "://" in file_name or ".." in PurePosixPath(file_name).parts:
        raise InputError(f"{store.redact(annotations)} names {file_name!r}, which lies outside the folder of pictures")
    return file_name


def _category_classes(
    name: str, root: Mapping[str, Any], classes: Sequence[str], given: Mapping[str, str]
) -> dict[Any, int]:
    """Category id -> class index; those left out are absent."""
    numbers = {}
    for category in root["categories"]:
        called = str(category.get("name"))
        chosen = given.get(called, called)
        if chosen == "" and called in given:
            continue
        if chosen not in classes:
            raise InputError(
                f"data '{name}': the COCO category '{called}' is no class; classes are {', '.join(classes)}; "
                'map it with categories = {...}, to "" to leave it out'
            )
        numbers[category.get("id")] = list(classes).index(chosen)
    return numbers


def _most_common_class(numbers: Mapping[Any, int], found: Sequence[Mapping[str, Any]]) -> int:
    """The class of most annotations of a picture, by which it is balanced; -1 without any."""
    if not found:
        return -1
    return int(np.bincount([numbers[one["category_id"]] for one in found]).argmax())
