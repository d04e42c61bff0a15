"""Zarr: features, maps and tiles between steps, runs and workers. Its reading side *is a Reader* (pixels.py)."""

from wsi_mmm.cache.choice import TileCacheChoice, choose, through_cache
from wsi_mmm.cache.entry import ArraySpec, CacheEntry
from wsi_mmm.cache.pixels import CachedReader, pixels_uri
from wsi_mmm.cache.quota import Quota

__all__ = [
    "ArraySpec", "CacheEntry", "CachedReader", "Quota", "TileCacheChoice", "choose", "pixels_uri", "through_cache",
]  # fmt: skip
