"""Blended maps of pixel tasks as Zarr v3: the probabilities that objects were made from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import zarr
from zarr.codecs import BloscCodec
from zarr.storage import LocalStore, ObjectStore

from wsi_mmm.storage import store
from wsi_mmm.storage.store import published_folder
from wsi_mmm.types import U8, Grid, TaskInfo

CHUNK = 512
SHARD = 2048


class MapTask(Protocol):
    """The facts about its task that a map file needs."""

    @property
    def info(self) -> TaskInfo: ...
    @property
    def channels(self) -> int: ...
    @property
    def stride(self) -> int: ...


def write_map(uri: str, task: MapTask, grid: Grid, blocks: Iterable[tuple[tuple[int, int], U8]]) -> None:
    """One array uint8[C, H, W] at ``uri``, map px = ``task.stride`` target px; px that no block covers are 0.

    ``blocks``: corner (y, x) in map px and uint8[C, h, w]; what lies beyond the slide is cut off. Attributes: task,
    kind, classes, mpp (of a map px), scale_x, scale_y (level-0 px per map px), value_scale (255 means 1.0).
    """
    height, width = (-(-size // task.stride) for size in (grid.height, grid.width))
    with published_folder(uri) as place:
        array = zarr.create_array(
            zarr_store(place),
            shape=(task.channels, height, width),
            chunks=(1, CHUNK, CHUNK),
            shards=(task.channels, SHARD, SHARD),
            dtype="uint8",
            fill_value=0,
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle"),
            dimension_names=("channel", "y", "x"),
            attributes=_map_attributes(task, grid),
        )
        for (y, x), block in blocks:
            part = block[:, : height - y, : width - x]
            if part.size and part.any():
                array[:, y : y + part.shape[1], x : x + part.shape[2]] = part


def _map_attributes(task: MapTask, grid: Grid) -> dict[str, Any]:
    return {
        "task": task.info.name,
        "kind": task.info.kind,
        "classes": list(task.info.classes),
        "mpp": grid.mpp * task.stride,
        "scale_x": grid.scale_x * task.stride,
        "scale_y": grid.scale_y * task.stride,
        "value_scale": 255,
    }


def zarr_store(uri: str) -> LocalStore | ObjectStore[Any]:
    """The Zarr store at ``uri``: a folder, or a prefix of an object store."""
    if store.is_local(uri):
        return LocalStore(store.local_path(uri))
    return ObjectStore(store.object_store(uri))
